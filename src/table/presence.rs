//! Signs of life: how a vacuum knows that a run is under way and may still commit files that no log names yet.
//!
//! A run puts a small object below the output prefix before it reads its first receipt, renews it while it works, and takes it away
//! when it ends. A vacuum withdraws old receipts first and looks for signs of life afterwards: a run that read a receipt before it
//! was withdrawn had put its sign before that, so it is seen, and one that starts later finds no receipt. A run that could not
//! renew its sign for long publishes nothing more, as others may take it for dead.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::TableError;
use crate::store::{Store, StoreError};

/// Folder of the signs, below the output prefix.
const FOLDER: &str = "_lookalike/live";

/// Time between two renewals. One small put a minute costs nothing beside a run.
const RENEW_EVERY: Duration = Duration::from_mins(1);

/// A run whose sign is older than this publishes nothing more.
const LAPSES_AFTER: TimeDelta = TimeDelta::minutes(30);

/// A sign older than this is of a run that was killed. Longer than [`LAPSES_AFTER`], so that a run stops before others go by its
/// death, however slow its last commit is.
const DEAD_AFTER: TimeDelta = TimeDelta::hours(2);

/// Signs read at a time.
const READS_IN_FLIGHT: usize = 16;

/// A run that is under way, as its sign says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sign {
    /// Name of its pipeline.
    pub pipeline: String,
    /// When it started, by its own clock.
    pub started_at: DateTime<Utc>,
}

/// The sign of life of this process, below one output prefix. Clones are the same sign.
#[derive(Debug, Clone)]
pub struct Presence(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    name: String,
    runtime: tokio::runtime::Handle,
    /// Milliseconds since 1970 of the last renewal; 0 before the first.
    renewed_ms: AtomicI64,
    renewing: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl Presence {
    /// A sign that is not there yet: a process that only reads never puts it.
    pub fn new(output: &Store, runtime: &tokio::runtime::Handle) -> Self {
        Self(Arc::new(Inner {
            store: output.clone(),
            name: format!("{FOLDER}/{}.json", uuid::Uuid::new_v4().simple()),
            runtime: runtime.clone(),
            renewed_ms: AtomicI64::new(0),
            renewing: Mutex::new(None),
        }))
    }

    /// Puts the sign and keeps renewing it until the last clone is dropped.
    pub async fn announce(&self, pipeline: &str) -> Result<(), TableError> {
        let inner = &self.0;
        let sign = Sign { pipeline: pipeline.to_owned(), started_at: Utc::now() };
        let url = || inner.store.url_of(&inner.name);
        let text = serde_json::to_vec(&sign).map_err(|source| TableError::Entry { url: url(), source })?;
        let text = bytes::Bytes::from(text);
        inner.store.put(&inner.name, text.clone()).await?;
        inner.renewed_ms.store(Utc::now().timestamp_millis(), Ordering::SeqCst);
        let (weak, store, name) = (Arc::downgrade(inner), inner.store.clone(), inner.name.clone());
        let renewing = inner.runtime.spawn(async move {
            loop {
                tokio::time::sleep(RENEW_EVERY).await;
                let put = store.put(&name, text.clone()).await;
                let Some(inner) = weak.upgrade() else { return };
                match put {
                    Ok(()) => inner.renewed_ms.store(Utc::now().timestamp_millis(), Ordering::SeqCst),
                    Err(error) => tracing::warn!("{error}; trying again in a minute"),
                }
            }
        });
        let old = inner.renewing.lock().unwrap_or_else(PoisonError::into_inner).replace(renewing);
        if let Some(old) = old {
            old.abort();
        }
        Ok(())
    }

    /// Fails where the sign is so old that others may take this run for dead.
    pub(super) fn check(&self) -> Result<(), TableError> {
        let renewed = self.0.renewed_ms.load(Ordering::SeqCst);
        let age = TimeDelta::milliseconds(Utc::now().timestamp_millis() - renewed);
        if renewed == 0 || age < LAPSES_AFTER {
            return Ok(());
        }
        Err(TableError::Lapsed { url: self.0.store.url_of(&self.0.name), minutes: age.num_minutes() })
    }

    /// The time by the store's clock, as of the announcement.
    pub async fn now(&self) -> Result<DateTime<Utc>, StoreError> {
        Ok(self.0.store.head(&self.0.name).await?.last_modified)
    }

    /// The runs that are under way below the prefix, this process's own left out. Ages are measured by the store's clock, for which
    /// this process must have announced itself.
    pub async fn others(&self) -> Result<Vec<Sign>, TableError> {
        let store = &self.0.store;
        let signs = store.list(FOLDER).await?;
        let own = |sign: &ObjectMeta| store.relative(&sign.location) == self.0.name;
        let now = signs.iter().find(|sign| own(sign)).map_or_else(Utc::now, |sign| sign.last_modified);
        let others = signs.iter().filter(|sign| !own(sign) && now - sign.last_modified < DEAD_AFTER);
        futures::stream::iter(others)
            .map(async |sign| {
                let name = store.relative(&sign.location);
                match store.get(&name).await {
                    Ok(text) => serde_json::from_slice(&text)
                        .map(Some)
                        .map_err(|source| TableError::Entry { url: store.url_of(&name), source }),
                    // It has ended since.
                    Err(error) if error.is_not_found() => Ok(None),
                    Err(error) => Err(error.into()),
                }
            })
            .buffered(READS_IN_FLIGHT)
            .try_filter_map(async |sign| Ok(sign))
            .try_collect()
            .await
    }

    /// The signs of runs that were killed.
    pub async fn dead(&self) -> Result<Vec<ObjectMeta>, StoreError> {
        let signs = self.0.store.list(FOLDER).await?;
        let newest = signs.iter().map(|sign| sign.last_modified).max().unwrap_or_default();
        Ok(signs.into_iter().filter(|sign| newest - sign.last_modified >= DEAD_AFTER).collect())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let renewing = self.renewing.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let Some(renewing) = renewing else { return };
        renewing.abort();
        // The last clone may go on a thread of the runtime, where one cannot wait; the sign then dies by its age.
        if tokio::runtime::Handle::try_current().is_err()
            && let Err(error) = self.runtime.block_on(self.store.delete(&self.name))
        {
            tracing::warn!("{error}; a vacuum will take this run for alive for two hours");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;
    use url::Url;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
    }

    #[test]
    fn a_run_is_seen_by_others_from_its_announcement_to_its_end() {
        let runtime = runtime();
        let store = Stores::default().open(&Url::parse("memory:///out").unwrap()).unwrap();
        let watcher = Presence::new(&store, runtime.handle());
        let run = Presence::new(&store, runtime.handle());
        let seen =
            || runtime.block_on(watcher.others()).unwrap().into_iter().map(|sign| sign.pipeline).collect::<Vec<_>>();
        assert!(seen().is_empty());
        runtime.block_on(run.announce("nightly")).unwrap();
        assert_eq!(seen(), ["nightly"]);
        assert!(runtime.block_on(run.others()).unwrap().is_empty());
        drop(run.clone());
        assert_eq!(seen(), ["nightly"]);
        drop(run);
        assert!(seen().is_empty());
    }

    #[test]
    fn a_run_that_could_not_be_seen_for_long_publishes_nothing() {
        let runtime = runtime();
        let store = Stores::default().open(&Url::parse("memory:///out").unwrap()).unwrap();
        let run = Presence::new(&store, runtime.handle());
        runtime.block_on(run.announce("nightly")).unwrap();
        run.check().unwrap();
        let long_ago = Utc::now() - LAPSES_AFTER - TimeDelta::minutes(1);
        run.0.renewed_ms.store(long_ago.timestamp_millis(), Ordering::SeqCst);
        assert!(matches!(run.check(), Err(TableError::Lapsed { minutes: 31, .. })));
    }
}
