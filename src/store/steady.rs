//! A cloud store over a network that breaks now and then: requests whose answer got lost are made again.
//!
//! The clients repeat most requests by themselves. They leave some alone: those whose answer breaks off in the middle, and a
//! put-if-absent that nobody answered, as it may have landed. Repeating the latter is right here, for whoever puts a thing only where
//! there is none takes "there is one" for an answer that may speak of an earlier attempt of their own.

use std::error::Error as StdError;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::path::Path;
use object_store::{
    CopyOptions, DynObjectStore, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// Times that a request is made again. A network that loses as many answers in a row loses the next one too.
const REPETITIONS: u32 = 8;

/// A client whose unanswered requests are made again.
#[derive(Debug)]
pub(super) struct Steady {
    inner: Arc<DynObjectStore>,
}

impl Steady {
    pub(super) fn new(inner: impl ObjectStore) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// Lists, and goes on behind the last object seen where an answer breaks off.
    fn list_behind(&self, prefix: Option<Path>, offset: Option<Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let inner = Arc::clone(&self.inner);
        let open = move |offset: Option<&Path>| match offset {
            Some(offset) => inner.list_with_offset(prefix.as_ref(), offset),
            None => inner.list(prefix.as_ref()),
        };
        let state = (open(offset.as_ref()), offset, 0);
        futures::stream::try_unfold(state, move |(mut objects, mut seen, mut repeated)| {
            let open = open.clone();
            async move {
                loop {
                    match objects.try_next().await {
                        Ok(None) => return Ok(None),
                        Ok(Some(object)) => {
                            seen = Some(object.location.clone());
                            return Ok(Some((object, (objects, seen, 0))));
                        }
                        Err(error) if is_unanswered(&error) && repeated < REPETITIONS => {
                            repeated += 1;
                            tracing::debug!(repeated, "listing again: {error}");
                            objects = open(seen.as_ref());
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        })
        .boxed()
    }
}

impl fmt::Display for Steady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Steady {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        until_answered(|| self.inner.put_opts(location, payload.clone(), options.clone())).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        until_answered(|| self.inner.put_multipart_opts(location, options.clone())).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        until_answered(|| self.inner.get_opts(location, options.clone())).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        until_answered(|| self.inner.get_ranges(location, ranges)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_behind(prefix.cloned(), None)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_behind(prefix.cloned(), Some(offset.clone()))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        until_answered(|| self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        until_answered(|| self.inner.copy_opts(from, to, options.clone())).await
    }
}

/// Makes a request until there is an answer to it.
async fn until_answered<'a, T>(request: impl Fn() -> BoxFuture<'a, Result<T>> + Send + Sync) -> Result<T> {
    let mut repeated = 0;
    loop {
        match request().await {
            Err(error) if is_unanswered(&error) && repeated < REPETITIONS => {
                repeated += 1;
                tracing::debug!(repeated, "asking again: {error}");
            }
            outcome => return outcome,
        }
    }
}

/// Whether a request was sent and its answer did not come, or not whole: it may have been done, or not. A connection that could not be
/// made is another matter, and the clients' own.
fn is_unanswered(error: &Error) -> bool {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<HttpError>() {
            return error.kind() != HttpErrorKind::Connect;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use object_store::memory::InMemory;
    use object_store::{ObjectStoreExt as _, PutMode};

    use super::*;

    /// A store whose answers get lost, one a call, as long as there are losses left.
    #[derive(Debug, Default)]
    struct Lossy {
        inner: InMemory,
        losses: Mutex<u32>,
    }

    impl Lossy {
        fn lost(&self) -> Option<Error> {
            let mut losses = self.losses.lock().unwrap();
            *losses = losses.checked_sub(1)?;
            let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
            let source = Box::new(HttpError::new(HttpErrorKind::Interrupted, reset));
            Some(Error::Generic { store: "lossy", source })
        }
    }

    impl fmt::Display for Lossy {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("lossy")
        }
    }

    #[async_trait]
    impl ObjectStore for Lossy {
        async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
            let done = self.inner.put_opts(location, payload, options).await;
            self.lost().map_or(done, Err)
        }

        async fn put_multipart_opts(
            &self,
            at: &Path,
            options: PutMultipartOptions,
        ) -> Result<Box<dyn MultipartUpload>> {
            self.inner.put_multipart_opts(at, options).await
        }

        async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
            self.inner.get_opts(location, options).await
        }

        fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
            self.inner.delete_stream(locations)
        }

        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            // One object, and then the answer breaks off.
            let lost = self.lost();
            let shown = if lost.is_some() { 1 } else { usize::MAX };
            self.inner.list(prefix).take(shown).chain(futures::stream::iter(lost.map(Err))).boxed()
        }

        fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
            let lost = self.lost();
            let shown = if lost.is_some() { 1 } else { usize::MAX };
            let rest = self.inner.list_with_offset(prefix, offset);
            rest.take(shown).chain(futures::stream::iter(lost.map(Err))).boxed()
        }

        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
            self.inner.list_with_delimiter(prefix).await
        }

        async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
            self.inner.copy_opts(from, to, options).await
        }
    }

    fn lossy(losses: u32) -> Steady {
        Steady::new(Lossy { losses: Mutex::new(losses), ..Lossy::default() })
    }

    #[tokio::test]
    async fn a_put_if_absent_that_nobody_answered_is_put_again_and_found_there() {
        let store = lossy(1);
        let put = store.put_opts(&"a".into(), "mine".into(), PutMode::Create.into()).await;
        assert!(matches!(put, Err(Error::AlreadyExists { .. })), "{put:?}");
        assert_eq!(store.get(&"a".into()).await.unwrap().bytes().await.unwrap(), "mine");
        let lost = lossy(REPETITIONS + 1).put_opts(&"a".into(), "mine".into(), PutMode::Create.into()).await;
        assert!(matches!(lost, Err(Error::Generic { .. })), "{lost:?}");
    }

    #[tokio::test]
    async fn a_listing_goes_on_where_it_broke_off() {
        let inner = InMemory::new();
        for name in ["a", "b", "c", "d", "e"] {
            inner.put(&name.into(), "x".into()).await.unwrap();
        }
        let store = Steady::new(Lossy { inner, losses: Mutex::new(3) });
        let found: Vec<_> = store.list(None).map_ok(|object| object.location.to_string()).try_collect().await.unwrap();
        assert_eq!(found, ["a", "b", "c", "d", "e"]);
    }
}
