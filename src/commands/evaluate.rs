//! `evaluate`: how well each score tells rows known to be bad from rows known to be good.

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::report::{self, Separation};
use crate::score::Rule;
use crate::source::predicate::Predicate;
use crate::stages::{Backfill, Job};

/// Prints the AUROC of every rule, for each partition that the pipeline's model embedded, and for all rows of these.
pub fn evaluate(
    context: &Context,
    pipeline: &Pipeline,
    positive: &str,
    negative: &str,
    as_json: bool,
) -> Result<ExitStatus, Error> {
    let positive = parse("--positive", positive)?;
    let negative = parse("--negative", negative)?;
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    if !Rule::OF_IMAGE.into_iter().any(|rule| job.contract.gives(rule)) {
        return Err(Error::Usage {
            message: format!("the model {} gives no score that could be evaluated", job.contract.name),
            hint: "scores need a model with a reconstruction, or with mu and logvar".to_owned(),
        });
    }
    let separations = report::separations(&job, &positive, &negative)?;
    for (option, count) in [
        ("--positive", separations.iter().map(|separation| separation.num_positive).sum::<usize>()),
        ("--negative", separations.iter().map(|separation| separation.num_negative).sum()),
    ] {
        if count == 0 && !separations.is_empty() {
            return Err(Error::Usage {
                message: format!("no row of {} satisfies {option}", job.latents.store().url()),
                hint: "the predicate may use kept columns ([source] columns) and partition keys".to_owned(),
            });
        }
    }
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

fn parse(option: &str, sql: &str) -> Result<Predicate, Error> {
    Predicate::parse(sql).map_err(|error| Error::Usage {
        message: format!("cannot understand {option}: {error}"),
        hint: "write it as SQL, such as \"defect > 0.5 AND split = 'rest'\"".to_owned(),
    })
}
