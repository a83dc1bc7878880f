//! `vacuum`: what lies below the output prefix and nobody needs any more. Lists it first, deletes only when told.
//!
//! Left over are data files that no version of their table since the cutoff names (of killed runs, of attempts that came second, of
//! rows that were replaced), log entries from before a checkpoint that is old enough, receipts, and uploads to the local disk that
//! were never finished. A file that a run under way may still commit is never deleted: receipts go first, and then, while any run
//! shows a sign of life, nothing else does. Why that is enough is said in [`crate::table::Presence`].

use chrono::{DateTime, TimeDelta, Utc};
use object_store::ObjectMeta;

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::schema::TableName;
use crate::stages::neighbors::searched;
use crate::store::{Store, Unfinished};
use crate::table::{Inputs, Presence, Receipts, Table};

/// Days that left-over objects are kept by default: as long as the slowest reader of an old version takes, and a week-end's failed
/// run is resumed from its receipts on Monday.
pub const DEFAULT_OLDER_THAN_DAYS: u32 = 7;

/// What is left over.
#[derive(Debug, Default)]
struct Found {
    /// Receipts and records of inputs: deleted first.
    receipts: Vec<ObjectMeta>,
    /// All other objects, with what they are.
    objects: Vec<(&'static str, ObjectMeta)>,
    unfinished: Vec<Unfinished>,
}

impl Found {
    fn count(&self) -> usize {
        self.receipts.len() + self.objects.len() + self.unfinished.len()
    }

    fn bytes(&self) -> u64 {
        let objects = self.receipts.iter().chain(self.objects.iter().map(|(_, object)| object));
        objects.map(|object| object.size).sum::<u64>() + self.unfinished.iter().map(|file| file.size).sum::<u64>()
    }
}

/// Lists what is older than `days` and needed by nobody; deletes it if `delete` says so.
pub fn vacuum(context: &Context, pipeline: &Pipeline, days: u32, delete: bool) -> Result<ExitStatus, Error> {
    let output = context.stores.open(&pipeline.output.table)?;
    let presence = Presence::new(&output, context.handle());
    context.block_on(presence.announce(&format!("vacuum of {}", pipeline.name)))?;
    let cutoff = context.block_on(presence.now())? - TimeDelta::days(i64::from(days));
    let found = find(context, pipeline, &output, &presence, cutoff)?;
    list(context, &output, &found)?;
    let what =
        format!("{} objects of {} bytes that were left over {days} days ago or before", found.count(), found.bytes());
    if found.count() == 0 {
        context.say(&format!("nothing was left over {days} days ago or before below {}", output.url()))?;
        return Ok(ExitStatus::Success);
    }
    if !delete {
        context.say(&format!("{what}; nothing was deleted, do so with --delete"))?;
        return Ok(ExitStatus::Success);
    }
    context.block_on(output.delete_all(found.receipts.iter().map(|receipt| receipt.location.clone()).collect()))?;
    let others = context.block_on(presence.others())?;
    if let Some(run) = others.first() {
        let started = run.started_at.format("%Y-%m-%d %H:%M UTC");
        return Err(Error::UnderWay {
            runs: others.len(),
            pipeline: run.pipeline.clone(),
            started: started.to_string(),
        });
    }
    context.block_on(output.delete_all(found.objects.iter().map(|(_, object)| object.location.clone()).collect()))?;
    for file in &found.unfinished {
        output.delete_unfinished(file)?;
    }
    context.say(&format!("deleted {what}"))?;
    Ok(ExitStatus::Success)
}

fn find(
    context: &Context,
    pipeline: &Pipeline,
    output: &Store,
    presence: &Presence,
    cutoff: DateTime<Utc>,
) -> Result<Found, Error> {
    let mut found = Found::default();
    for name in TableName::ALL {
        let table = Table::new(output, name, &[], pipeline.output.publish, presence, context.handle())?;
        let left_over = context.block_on(table.left_over(cutoff))?;
        found.objects.extend(left_over.files.into_iter().map(|object| ("data file", object)));
        found.objects.extend(left_over.log.into_iter().map(|object| ("log entry", object)));
        if name == TableName::Latents {
            let live = context.block_on(table.live())?;
            let inputs = context.block_on(Inputs::left_over(output, &live))?;
            found.receipts.extend(inputs.into_iter().filter(|object| object.last_modified < cutoff));
        }
    }
    let searched = context.block_on(searched::left_over(output))?;
    found.receipts.extend(searched.into_iter().filter(|object| object.last_modified < cutoff));
    let receipts = context.block_on(Receipts::all(output))?;
    found.receipts.extend(receipts.into_iter().filter(|object| object.last_modified < cutoff));
    let dead = context.block_on(presence.dead())?;
    found.objects.extend(dead.into_iter().map(|object| ("sign of life", object)));
    found.unfinished = output.unfinished()?.into_iter().filter(|file| file.modified < cutoff).collect();
    Ok(found)
}

/// A line for each object: what it is, its bytes, when it was written, and where it lies.
fn list(context: &Context, output: &Store, found: &Found) -> Result<(), Error> {
    let receipts = found.receipts.iter().map(|object| ("receipt", object));
    let objects = found.objects.iter().map(|(what, object)| (*what, object));
    for (what, object) in receipts.chain(objects) {
        let written = object.last_modified.format("%Y-%m-%d %H:%M");
        let url = output.url_of(&output.relative(&object.location));
        context.print(&format!("{what:<17} {:>12} {written} {url}", object.size))?;
    }
    for file in &found.unfinished {
        let written = file.modified.format("%Y-%m-%d %H:%M");
        context.print(&format!("{:<17} {:>12} {written} {}", "unfinished upload", file.size, file.path.display()))?;
    }
    Ok(())
}
