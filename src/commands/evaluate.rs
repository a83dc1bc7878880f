//! `evaluate`: how well each score tells rows known to be bad from rows known to be good.

use super::Context;
use crate::config::Pipeline;
use crate::error::{Error, ExitStatus};
use crate::report::{self, Separation};
use crate::source::SourceError;
use crate::source::predicate::Predicate;
use crate::stages::Job;

/// Prints the AUROC of every rule, for each partition that the pipeline's model embedded, and for all rows of these.
pub fn evaluate(
    context: &Context,
    pipeline: &Pipeline,
    positive: &str,
    negative: &str,
    as_json: bool,
) -> Result<ExitStatus, Error> {
    let positive = Predicate::parse(positive).map_err(SourceError::from)?;
    let negative = Predicate::parse(negative).map_err(SourceError::from)?;
    let job = Job::prepare(context, pipeline)?;
    let separations = report::separations(&job, &positive, &negative)?;
    if separations.is_empty() {
        return Err(Error::Usage {
            message: format!("no row of {} is positive or negative", job.latents.store().url()),
            hint: "check the predicates, and that `lookalike run` has been run".to_owned(),
        });
    }
    if as_json {
        let rows: Vec<_> = separations.iter().map(Separation::to_json).collect();
        context.print(&serde_json::Value::from(rows).to_string())?;
        return Ok(ExitStatus::Success);
    }
    context.print(&format!("{:<24} {:<24} {:>9} {:>9} {:>7}", "partition", "rule", "positive", "negative", "AUROC"))?;
    for separation in &separations {
        context.print(&format!(
            "{:<24} {:<24} {:>9} {:>9} {:>7}",
            separation.partition,
            separation.rule.name(),
            separation.num_positive,
            separation.num_negative,
            separation.auroc.map_or_else(|| "-".to_owned(), |auroc| format!("{auroc:.4}")),
        ))?;
    }
    Ok(ExitStatus::Success)
}
