//! A store that fails on request: any store behind it, and in front of it the faults that the clients of real stores report after
//! their own retries, at the n-th operation or by chance.
//!
//! Without faults it is a store like any other, which `object_store`'s own conformance suite confirms below.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{
    CopyMode, CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt as _, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    UploadPart,
};

/// How long a slow answer takes: long enough that everything else that is under way comes first.
const SLOW: Duration = Duration::from_millis(20);

/// A request to a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Operation {
    Put,
    /// A put, or a copy, that is refused where an object is.
    Create,
    StartMultipart,
    PutPart,
    CompleteMultipart,
    AbortMultipart,
    Get,
    Head,
    List,
    Delete,
    Copy,
}

impl Operation {
    /// Whether it leaves the store other than it was.
    pub(crate) fn is_change(self) -> bool {
        !matches!(self, Self::Get | Self::Head | Self::List)
    }

    fn needs_room(self) -> bool {
        self.is_change() && !matches!(self, Self::Delete | Self::AbortMultipart)
    }

    fn method(self) -> &'static str {
        match self {
            Self::Put | Self::Create | Self::PutPart | Self::Copy => "PUT",
            Self::StartMultipart | Self::CompleteMultipart => "POST",
            Self::Get | Self::List => "GET",
            Self::Head => "HEAD",
            Self::Delete | Self::AbortMultipart => "DELETE",
        }
    }
}

/// Why a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// 503, until the client gave up.
    Unavailable,
    /// The connection was reset.
    Reset,
    /// The disk is full.
    Full,
}

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing is done, and the answer is an error.
    Before(Cause),
    /// It is done, and the answer is an error all the same.
    After(Cause),
    /// It is done late.
    Slow,
    /// The body of an object, or a listing, breaks off in the middle.
    Truncated,
    /// A create is refused, although nothing is there: S3's 409 while another request for the same name is under way.
    Conflict,
    /// A create is done; the client did not hear of it, tried again, and was refused because of its own object.
    ConflictWithItself,
}

impl Fault {
    /// Whether it can befall an operation. To fail after a read is to fail before it.
    pub(crate) fn can_befall(self, operation: Operation) -> bool {
        match self {
            Self::Before(Cause::Full) | Self::After(Cause::Full) => operation.needs_room(),
            Self::Before(_) | Self::Slow => true,
            Self::After(_) => operation.is_change(),
            Self::Truncated => matches!(operation, Operation::Get | Operation::List),
            Self::Conflict | Self::ConflictWithItself => operation == Operation::Create,
        }
    }

    /// Every fault there is.
    pub(crate) const ALL: [Self; 9] = [
        Self::Before(Cause::Unavailable),
        Self::Before(Cause::Reset),
        Self::Before(Cause::Full),
        Self::After(Cause::Unavailable),
        Self::After(Cause::Reset),
        Self::Slow,
        Self::Truncated,
        Self::Conflict,
        Self::ConflictWithItself,
    ];
}

/// When faults happen.
#[derive(Debug)]
pub(crate) enum Plan {
    /// Never.
    Never,
    /// Once: at the n-th (from 1) of those operations that it can befall.
    Once(u64, Fault),
    /// At each operation with this probability, any of those that can befall it.
    Random(f64, fastrand::Rng),
}

/// What has passed through a store, and what is to happen to it.
#[derive(Debug)]
struct Record {
    plan: Mutex<Plan>,
    seen: Mutex<Vec<(Operation, Path)>>,
    injected: Mutex<Vec<(Fault, Operation, Path)>>,
    candidates: AtomicU64,
}

impl Record {
    /// Counts an operation, and decides what happens to it.
    fn next(&self, operation: Operation, path: &Path) -> Option<Fault> {
        self.seen.lock().unwrap().push((operation, path.clone()));
        let fault = match &mut *self.plan.lock().unwrap() {
            Plan::Never => None,
            Plan::Once(n, fault) => {
                let is_due = fault.can_befall(operation) && self.candidates.fetch_add(1, Ordering::Relaxed) + 1 == *n;
                is_due.then_some(*fault)
            }
            Plan::Random(rate, rng) => (rng.f64() < *rate).then(|| {
                let faults: Vec<Fault> = Fault::ALL.into_iter().filter(|fault| fault.can_befall(operation)).collect();
                faults[rng.usize(..faults.len())]
            }),
        };
        self.injected.lock().unwrap().extend(fault.map(|fault| (fault, operation, path.clone())));
        fault
    }

    /// Does a request, or does not, as the fault says.
    async fn answer<T>(
        &self,
        operation: Operation,
        path: &Path,
        fault: Option<Fault>,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        match fault {
            None | Some(Fault::Truncated) => request.await,
            Some(Fault::Slow) => {
                tokio::time::sleep(SLOW).await;
                request.await
            }
            Some(Fault::Before(cause)) => Err(failure(cause, operation, path)),
            Some(Fault::After(cause)) => {
                request.await.ok();
                Err(failure(cause, operation, path))
            }
            Some(Fault::Conflict) => Err(conflict(operation, path, "409 Conflict: ConditionalRequestConflict")),
            Some(Fault::ConflictWithItself) => {
                request.await.ok();
                Err(conflict(operation, path, "412 Precondition Failed: PreconditionFailed"))
            }
        }
    }
}

/// What `object_store`'s clients put into their errors: its text is that of its `RetryError`, which others cannot make.
#[derive(Debug, thiserror::Error)]
#[error(
    "Error performing {method} http://store.invalid/{path} in 171.5s, after 10 retries, max_retries: 10, retry_timeout: 180s  - {cause}"
)]
struct GaveUp {
    method: &'static str,
    path: Path,
    #[source]
    cause: Box<dyn std::error::Error + Send + Sync>,
}

/// What its client of local disks puts into its errors.
#[derive(Debug, thiserror::Error)]
#[error("Unable to copy data to file: {source}")]
struct UnableToCopy {
    source: std::io::Error,
}

fn failure(cause: Cause, operation: Operation, path: &Path) -> Error {
    let gave_up = |cause| GaveUp { method: operation.method(), path: path.clone(), cause };
    let reset = || std::io::Error::new(std::io::ErrorKind::ConnectionReset, "connection reset by peer");
    match cause {
        Cause::Unavailable => Error::Generic {
            store: "S3",
            source: Box::new(gave_up("Server returned non-2xx status code: 503 Service Unavailable: SlowDown".into())),
        },
        Cause::Reset => Error::Generic { store: "S3", source: Box::new(gave_up(Box::new(reset()))) },
        Cause::Full => Error::Generic {
            store: "LocalFileSystem",
            source: Box::new(UnableToCopy { source: std::io::ErrorKind::StorageFull.into() }),
        },
    }
}

/// A refused create, as the client reports both of S3's answers to one.
fn conflict(operation: Operation, path: &Path, status: &str) -> Error {
    let cause = format!("Server returned non-2xx status code: {status}").into();
    let source = GaveUp { method: operation.method(), path: path.clone(), cause };
    Error::AlreadyExists { path: path.to_string(), source: Box::new(source) }
}

/// The first half of `items`, and then an error.
fn broken_off<T: Clone + Send + 'static>(
    items: &[T],
    operation: Operation,
    path: &Path,
) -> BoxStream<'static, Result<T>> {
    let half: Vec<Result<T>> = items[..items.len() / 2].iter().cloned().map(Ok).collect();
    stream::iter(half.into_iter().chain([Err(failure(Cause::Reset, operation, path))])).boxed()
}

/// A store that counts what is asked of it and fails as planned.
#[derive(Debug)]
pub(crate) struct FaultStore<T> {
    inner: Arc<T>,
    record: Arc<Record>,
}

impl<T> Clone for FaultStore<T> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), record: Arc::clone(&self.record) }
    }
}

impl<T: ObjectStore> FaultStore<T> {
    pub(crate) fn new(inner: Arc<T>, plan: Plan) -> Self {
        let record = Record {
            plan: Mutex::new(plan),
            seen: Mutex::default(),
            injected: Mutex::default(),
            candidates: AtomicU64::new(0),
        };
        Self { inner, record: Arc::new(record) }
    }

    /// The store behind.
    pub(crate) fn inner(&self) -> &T {
        &self.inner
    }

    /// The operations so far, in their order.
    pub(crate) fn seen(&self) -> Vec<(Operation, Path)> {
        self.record.seen.lock().unwrap().clone()
    }

    /// The faults so far, in their order.
    pub(crate) fn injected(&self) -> Vec<(Fault, Operation, Path)> {
        self.record.injected.lock().unwrap().clone()
    }

    async fn answer<R>(
        &self,
        operation: Operation,
        path: &Path,
        request: impl Future<Output = Result<R>>,
    ) -> Result<R> {
        let fault = self.record.next(operation, path);
        self.record.answer(operation, path, fault, request).await
    }

    /// A listing; it counts when it is first asked for entries.
    fn listing(
        &self,
        prefix: Option<&Path>,
        entries: BoxStream<'static, Result<ObjectMeta>>,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let (record, prefix) = (Arc::clone(&self.record), prefix.cloned().unwrap_or_default());
        let start = async move {
            let fault = record.next(Operation::List, &prefix);
            let entries = async {
                if fault != Some(Fault::Truncated) {
                    return Ok(entries);
                }
                let entries: Vec<ObjectMeta> = entries.try_collect().await?;
                Ok(broken_off(&entries, Operation::List, &prefix))
            };
            record.answer(Operation::List, &prefix, fault, entries).await
        };
        stream::once(start).try_flatten().boxed()
    }
}

impl<T: ObjectStore> fmt::Display for FaultStore<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultStore({})", self.inner)
    }
}

/// Ranges are fetched, and objects renamed, by the trait's own methods, which are those of the clients of clouds: a request for each
/// run of ranges; a copy and a deletion.
#[async_trait]
impl<T: ObjectStore> ObjectStore for FaultStore<T> {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let operation = if opts.mode == PutMode::Create { Operation::Create } else { Operation::Put };
        self.answer(operation, location, self.inner.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let start = self.inner.put_multipart_opts(location, opts);
        let inner = self.answer(Operation::StartMultipart, location, start).await?;
        Ok(Box::new(FaultUpload { inner, path: location.clone(), record: Arc::clone(&self.record) }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let operation = if options.head { Operation::Head } else { Operation::Get };
        let fault = self.record.next(operation, location);
        let got = self.record.answer(operation, location, fault, self.inner.get_opts(location, options)).await?;
        if fault != Some(Fault::Truncated) {
            return Ok(got);
        }
        let (meta, range, attributes, extensions) =
            (got.meta.clone(), got.range.clone(), got.attributes.clone(), got.extensions.clone());
        let body = got.bytes().await?;
        let bytes: Vec<_> = [body.slice(..body.len() / 2), body.slice(body.len() / 2..)].into();
        let payload = GetResultPayload::Stream(broken_off(&bytes, operation, location));
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        locations
            .then(move |location| {
                let store = store.clone();
                async move {
                    let location = location?;
                    store.answer(Operation::Delete, &location, store.inner.delete(&location)).await?;
                    Ok(location)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.listing(prefix, self.inner.list(prefix))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.listing(prefix, self.inner.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let path = prefix.cloned().unwrap_or_default();
        let fault = self.record.next(Operation::List, &path);
        // All pages are fetched before the first entry is handed out, so half a listing is none.
        let fault = if fault == Some(Fault::Truncated) { Some(Fault::Before(Cause::Reset)) } else { fault };
        self.record.answer(Operation::List, &path, fault, self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let operation = if options.mode == CopyMode::Create { Operation::Create } else { Operation::Copy };
        self.answer(operation, to, self.inner.copy_opts(from, to, options)).await
    }
}

/// An upload in parts; each part and its end count as operations.
#[derive(Debug)]
struct FaultUpload {
    inner: Box<dyn MultipartUpload>,
    path: Path,
    record: Arc<Record>,
}

#[async_trait]
impl MultipartUpload for FaultUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (operation, path, record) = (Operation::PutPart, self.path.clone(), Arc::clone(&self.record));
        let fault = record.next(operation, &path);
        if let Some(Fault::Before(cause)) = fault {
            return Box::pin(async move { Err(failure(cause, operation, &path)) });
        }
        let part = self.inner.put_part(data);
        Box::pin(async move { record.answer(operation, &path, fault, part).await })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let fault = self.record.next(Operation::CompleteMultipart, &self.path);
        self.record.answer(Operation::CompleteMultipart, &self.path, fault, self.inner.complete()).await
    }

    async fn abort(&mut self) -> Result<()> {
        let fault = self.record.next(Operation::AbortMultipart, &self.path);
        self.record.answer(Operation::AbortMultipart, &self.path, fault, self.inner.abort()).await
    }
}

/// The store without faults, and faults on single requests.
mod tests {
    use object_store::integration;
    use object_store::local::LocalFileSystem;
    use object_store::memory::InMemory;

    use super::*;
    use crate::support::folder;

    /// What `object_store` demands of every store; deletes all that is there.
    async fn conforms<T: ObjectStore>(store: &FaultStore<T>, has_versions: bool) {
        integration::put_get_delete_list(store).await;
        integration::list_with_offset_exclusivity(store).await;
        integration::get_opts(store).await;
        integration::list_uses_directories_correctly(store).await;
        integration::list_with_delimiter(store).await;
        integration::rename_and_copy(store).await;
        integration::copy_if_not_exists(store).await;
        integration::stream_get(store).await;
        integration::put_opts(store, has_versions).await;
    }

    #[tokio::test]
    async fn without_faults_it_conforms_over_memory() {
        let store = FaultStore::new(Arc::new(InMemory::new()), Plan::Never);
        conforms(&store, true).await;
        // Parts by number are the inner store's; what they make is read through this one.
        integration::multipart(&store, store.inner.as_ref()).await;
        integration::multipart_with_opts(&store, store.inner.as_ref()).await;
        integration::multipart_put_part_out_of_order(&store, store.inner.as_ref()).await;
        integration::put_get_attributes(&store).await;
        assert!(store.seen().len() > 200, "{}", store.seen().len());
    }

    #[tokio::test]
    async fn without_faults_it_conforms_over_a_disk() {
        let folder = folder();
        let disk = LocalFileSystem::new_with_prefix(folder.path()).unwrap();
        let store = FaultStore::new(Arc::new(disk), Plan::Never);
        conforms(&store, false).await;
        integration::copy_rename_nonexistent_object(&store).await;
        assert!(store.seen().len() > 200, "{}", store.seen().len());
    }

    /// A store that holds `old`, with a fault at the first operation that it can befall.
    async fn failing(fault: Fault) -> FaultStore<InMemory> {
        let inner = InMemory::new();
        inner.put(&"old".into(), "0123456789".into()).await.unwrap();
        FaultStore::new(Arc::new(inner), Plan::Once(1, fault))
    }

    fn causes(error: &Error) -> Vec<String> {
        let mut causes = vec![error.to_string()];
        let mut next = std::error::Error::source(error);
        while let Some(cause) = next {
            causes.push(format!("{cause:?}"));
            next = cause.source();
        }
        causes
    }

    #[tokio::test]
    async fn what_fails_before_is_not_done_and_what_fails_after_is() {
        for (fault, is_done) in [(Fault::Before(Cause::Unavailable), false), (Fault::After(Cause::Reset), true)] {
            let new = Path::from("new");
            let store = failing(fault).await;
            let error = store.put(&new, "x".into()).await.unwrap_err();
            assert!(matches!(error, Error::Generic { .. }), "{error:?}");
            assert_eq!(store.inner.head(&new).await.is_ok(), is_done, "{fault:?}");
            assert_eq!(store.injected(), [(fault, Operation::Put, new)]);
            let store = failing(fault).await;
            store.delete(&"old".into()).await.unwrap_err();
            assert_eq!(store.inner.head(&"old".into()).await.is_err(), is_done, "{fault:?}");
        }
    }

    #[tokio::test]
    async fn an_upload_in_parts_can_fail_at_each_of_its_requests() {
        let requests = [Operation::StartMultipart, Operation::PutPart, Operation::CompleteMultipart];
        for (fault, is_done) in [(Fault::Before(Cause::Reset), false), (Fault::After(Cause::Reset), true)] {
            for (number, request) in (1..).zip(requests) {
                let store = FaultStore::new(Arc::new(InMemory::new()), Plan::Once(number, fault));
                let upload = async {
                    let mut upload = store.put_multipart(&"new".into()).await?;
                    upload.put_part("x".into()).await?;
                    upload.complete().await
                };
                upload.await.unwrap_err();
                assert_eq!(store.injected(), [(fault, request, "new".into())]);
                let is_complete = is_done && request == Operation::CompleteMultipart;
                assert_eq!(store.inner.head(&"new".into()).await.is_ok(), is_complete, "{fault:?} at {request:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_truncated_body_and_a_truncated_listing_end_in_an_error() {
        let store = failing(Fault::Truncated).await;
        let body: Vec<_> = store.get(&"old".into()).await.unwrap().into_stream().collect().await;
        assert!(matches!(body.as_slice(), [Ok(half), Err(_)] if half.as_ref() == b"01234"), "{body:?}");
        assert_eq!(store.get_range(&"old".into(), 2..4).await.unwrap().as_ref(), b"23");
        let store = failing(Fault::Truncated).await;
        store.put(&"older".into(), "x".into()).await.unwrap();
        let listed: Vec<_> = store.list(None).collect().await;
        assert!(matches!(listed.as_slice(), [Ok(old), Err(_)] if old.location == "old".into()), "{listed:?}");
        assert_eq!(store.list(None).count().await, 2);
        let store = failing(Fault::Truncated).await;
        assert!(store.get_ranges(&"old".into(), &[0..1, 2..3]).await.is_err());
    }

    #[tokio::test]
    async fn a_refused_create_leaves_nothing_or_its_own_object() {
        for (fault, is_there) in [(Fault::Conflict, false), (Fault::ConflictWithItself, true)] {
            let store = failing(fault).await;
            // Puts that overwrite are not befallen.
            store.put(&"old".into(), "y".into()).await.unwrap();
            let created = store.put_opts(&"new".into(), "x".into(), PutMode::Create.into()).await;
            assert!(matches!(created, Err(Error::AlreadyExists { .. })), "{created:?}");
            assert_eq!(store.inner.head(&"new".into()).await.is_ok(), is_there, "{fault:?}");
            let again = store.put_opts(&"new".into(), "x".into(), PutMode::Create.into()).await;
            assert_eq!(again.is_err(), is_there, "{fault:?}");
        }
    }

    #[tokio::test]
    async fn errors_tell_their_cause_as_those_of_real_clients_do() {
        for (cause, words) in
            [(Cause::Unavailable, "503"), (Cause::Reset, "ConnectionReset"), (Cause::Full, "StorageFull")]
        {
            let store = failing(Fault::Before(cause)).await;
            let error = store.put(&"new".into(), "x".into()).await.unwrap_err();
            let causes = causes(&error);
            assert!(causes.iter().any(|text| text.contains(words)), "{causes:?}");
        }
    }

    #[tokio::test]
    async fn a_seed_gives_the_same_faults_again() {
        let faults = async |seed| {
            let store = FaultStore::new(Arc::new(InMemory::new()), Plan::Random(0.3, fastrand::Rng::with_seed(seed)));
            for number in 0..50 {
                let path = Path::from(format!("object-{number}"));
                store.put(&path, "x".into()).await.ok();
                store.get(&path).await.ok();
            }
            store.injected()
        };
        let (first, again, other) = (faults(1).await, faults(1).await, faults(2).await);
        assert!(first == again && first != other && first.len() > 10, "{} faults", first.len());
    }
}
