//! What can end a command, and which exit code tells the scheduler what to do about it.

use delta_kernel::KernelError;

use crate::config::ConfigError;
use crate::model::{ModelError, RuntimeError};
use crate::source::SourceError;
use crate::store::{StoreError, credential_fault};
use crate::table::TableError;

/// The exit codes: a contract with cron, Airflow and Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Committed, or nothing to do.
    Success = 0,
    /// Something that should not happen: a bug, or a broken machine.
    Unexpected = 1,
    /// The command line or the pipeline file is wrong; running it again will not help.
    Usage = 2,
    /// Committed, but more images were rejected than the pipeline allows.
    Rejects = 3,
    /// The data or the model is not what the pipeline says; running it again will not help.
    Contract = 4,
    /// A store or another writer stood in the way; running it again is safe and may help.
    Transient = 5,
    /// Something is missing on this machine: the runtime, the GPU, memory, disk, credentials that are good.
    Resource = 6,
    /// There was nothing to do, and the command line asks to be told so.
    NothingToDo = 99,
    /// Stopped by SIGINT.
    Interrupted = 130,
    /// Stopped by SIGTERM.
    Terminated = 143,
}

impl ExitStatus {
    /// Whether the tables are now as they should be.
    pub fn is_success(self) -> bool {
        matches!(self, Self::Success | Self::NothingToDo)
    }
}

/// Anything that ends a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The pipeline file is wrong.
    #[error(transparent)]
    Config(Box<ConfigError>),
    /// The command line is wrong.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do.
        hint: String,
    },
    /// The source table is wrong or cannot be read.
    #[error(transparent)]
    Source(Box<SourceError>),
    /// The model package is wrong or cannot be read.
    #[error(transparent)]
    Model(Box<ModelError>),
    /// A published table cannot be read or changed.
    #[error(transparent)]
    Table(Box<TableError>),
    /// A store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The reference does not fit, or cannot be made.
    #[error(transparent)]
    Reference(Box<crate::reference::ReferenceError>),
    /// A model cannot be fitted.
    #[error(transparent)]
    Fit(Box<crate::commands::fit::FitError>),
    /// A pass over the images ended early.
    #[error(transparent)]
    Pass(Box<crate::pass::PassError>),
    /// The neighbors cannot be computed.
    #[error("cannot compute the neighbors")]
    Neighbors(#[from] crate::neighbors::exact::JoinError),
    /// An image that the command line names cannot be used.
    #[error("cannot compare {image}")]
    Image {
        /// The image, as it was named.
        image: String,
        /// Why.
        source: crate::decode::Reject,
    },
    /// A picture cannot be written.
    #[error("cannot encode a picture as PNG")]
    Picture(#[from] image::ImageError),
    /// What is held is more than may be.
    #[error("the neighbors stage needs {needed} bytes, and execution.memory_limit is {limit}")]
    MemoryLimit {
        /// The limit.
        limit: u64,
        /// Bytes of ids, of the files being read, and of the fewest rows that are compared at a time.
        needed: u64,
    },
    /// A plan cannot be worked on.
    #[error(transparent)]
    Task(#[from] crate::tasks::TaskError),
    /// Rows do not fit together.
    #[error("cannot put together the rows of {table}")]
    Rows {
        /// The table.
        table: &'static str,
        /// Why.
        source: arrow::error::ArrowError,
    },
    /// Table mathematics failed.
    #[error("cannot compute {what}")]
    Frame {
        /// What was computed.
        what: &'static str,
        /// Why.
        source: polars::error::PolarsError,
    },
    /// A store or this machine is not fit for a run.
    #[error(transparent)]
    Check(#[from] crate::commands::check::CheckError),
    /// The pipeline file cannot be read.
    #[error("cannot read the pipeline file {file}")]
    PipelineFile {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// Runs are under way that may still commit what looks left over.
    #[error(
        "{runs} runs are under way, among them one of `{pipeline}` since {started}; their files may look left over, so none was deleted"
    )]
    UnderWay {
        /// How many.
        runs: usize,
        /// The pipeline of one.
        pipeline: String,
        /// When that one started.
        started: String,
    },
    /// Somebody told the process to stop.
    #[error("stopped by {}", signal.name())]
    Stopped {
        /// How.
        signal: crate::stop::Signal,
    },
    /// This machine denies something that every process has.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Boxes the causes, which are large, so that a `Result` is not.
macro_rules! from_boxed {
    ($($variant:ident: $cause:ty),+ $(,)?) => {$(
        impl From<$cause> for Error {
            fn from(cause: $cause) -> Self {
                Self::$variant(Box::new(cause))
            }
        }
    )+};
}

from_boxed! {
    Config: ConfigError,
    Source: SourceError,
    Model: ModelError,
    Table: TableError,
    Reference: crate::reference::ReferenceError,
    Fit: crate::commands::fit::FitError,
    Pass: crate::pass::PassError,
}

impl From<RuntimeError> for Error {
    fn from(error: RuntimeError) -> Self {
        ModelError::from(error).into()
    }
}

impl Error {
    /// What led to it, from the outside in.
    pub fn causes(&self) -> Vec<String> {
        let mut causes = Vec::new();
        let mut last = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            // Some wrappers repeat what they wrap.
            let text = error.to_string();
            if !last.contains(&text) {
                causes.push(text.clone());
            }
            last = text;
            cause = error.source();
        }
        causes
    }

    /// The exit code.
    pub fn exit_status(&self) -> ExitStatus {
        match self {
            Self::Config(_) | Self::Usage { .. } | Self::PipelineFile { .. } => ExitStatus::Usage,
            Self::Store(error) => store_status(error.answer()),
            Self::Source(error) => cause_status(error.as_ref()).unwrap_or(source_status(error)),
            Self::Model(error) => cause_status(error.as_ref()).unwrap_or(model_status(error)),
            Self::Table(error) => cause_status(error.as_ref()).unwrap_or(table_status(error)),
            Self::Reference(error) => cause_status(error.as_ref()).unwrap_or(ExitStatus::Contract),
            Self::Fit(error) => cause_status(error.as_ref()).unwrap_or(ExitStatus::Contract),
            Self::Task(error) => error.exit_status(),
            Self::Image { .. } => ExitStatus::Contract,
            Self::Check(_) | Self::MemoryLimit { .. } => ExitStatus::Resource,
            Self::Pass(_) | Self::Neighbors(_) | Self::Picture(_) | Self::Rows { .. } | Self::Frame { .. } => {
                ExitStatus::Unexpected
            }
            Self::UnderWay { .. } => ExitStatus::Transient,
            Self::Stopped { signal } => signal.exit_status(),
            Self::Io { source, .. } => io_status(source),
        }
    }

    /// What the user can do about it, where there is more to say than the message does.
    pub fn hint(&self) -> Option<String> {
        let own = match self {
            Self::Config(error) => {
                let helps: Vec<String> = error.problems().iter().map(|problem| problem.fault().help()).collect();
                Some(helps.join("; "))
            }
            Self::Usage { hint, .. } => Some(hint.clone()),
            Self::Store(error) => error.hint(),
            Self::Source(error) => error.hint(),
            Self::Model(error) => error.hint(),
            Self::Table(error) => error.hint(),
            Self::Reference(error) => error.hint(),
            Self::Fit(error) => error.hint(),
            Self::Check(error) => Some(error.hint().to_owned()),
            Self::Task(error) => Some(error.hint()),
            Self::MemoryLimit { .. } => Some(
                "raise memory_limit; or compare less: scope = \"partition\", a smaller k, or neighbors of fewer rows"
                    .to_owned(),
            ),
            Self::UnderWay { .. } => Some(
                "run it again when they have ended; a run that was killed counts as ended two hours later".to_owned(),
            ),
            Self::Stopped { .. } => Some("what was finished is kept; run it again to go on".to_owned()),
            _ => None,
        };
        own.or_else(|| match root(self)? {
            Root::Store(answer) => crate::store::hint(answer),
            Root::Disk(_) => None,
        })
    }
}

/// What failed underneath.
enum Root<'a> {
    Store(&'a object_store::Error),
    Disk(&'a std::io::Error),
}

/// The store or the disk that failed underneath, if it was one of them: libraries wrap its answer in errors of their own, some of which
/// do not tell their cause where errors are asked for it.
fn root<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<Root<'a>> {
    if let Some(answer) = error.downcast_ref() {
        return Some(Root::Store(answer));
    }
    if let Some(error) = error.downcast_ref::<std::io::Error>() {
        // What is inside counts first: an adapter from stores to streams makes every answer an error of no kind. A kind that
        // decides nothing may come from a decoder, and is for the caller to judge.
        let inside = error.get_ref().and_then(|inside| root(inside));
        return inside.or_else(|| (io_status(error) != ExitStatus::Unexpected).then_some(Root::Disk(error)));
    }
    let kernel = error.downcast_ref::<KernelError>();
    match kernel.or_else(|| error.downcast_ref::<Box<KernelError>>().map(AsRef::as_ref)) {
        Some(KernelError::Backtraced { source, .. }) => root(source.as_ref()),
        Some(KernelError::ObjectStore(answer)) => Some(Root::Store(answer)),
        Some(KernelError::IOError(error)) => root(error),
        Some(KernelError::Arrow(error)) => root(error),
        _ => error.source().and_then(root),
    }
}

/// The exit code of the store or the disk that failed underneath, if it was one of them.
fn cause_status(error: &(dyn std::error::Error + 'static)) -> Option<ExitStatus> {
    root(error).map(|root| match root {
        Root::Store(answer) => store_status(answer),
        Root::Disk(error) => io_status(error),
    })
}

/// A store's answer: what is not there is not as agreed; credentials and disks are this machine's matter; all else may pass.
fn store_status(answer: &object_store::Error) -> ExitStatus {
    use object_store::Error as Answer;
    if matches!(answer, Answer::NotFound { .. }) || crate::store::is_bucket_missing(answer) {
        return ExitStatus::Contract;
    }
    if credential_fault(answer).is_some() {
        return ExitStatus::Resource;
    }
    let mut cause: Option<&dyn std::error::Error> = Some(answer);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io_status(io) == ExitStatus::Resource
        {
            return ExitStatus::Resource;
        }
        cause = error.source();
    }
    match answer {
        Answer::InvalidPath { .. }
        | Answer::NotSupported { .. }
        | Answer::NotImplemented { .. }
        | Answer::UnknownConfigurationKey { .. } => ExitStatus::Usage,
        _ => ExitStatus::Transient,
    }
}

/// A local disk's answer.
fn io_status(error: &std::io::Error) -> ExitStatus {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::StorageFull
        | ErrorKind::QuotaExceeded
        | ErrorKind::OutOfMemory
        | ErrorKind::ReadOnlyFilesystem
        | ErrorKind::PermissionDenied
        | ErrorKind::NotADirectory
        | ErrorKind::NotFound => ExitStatus::Resource,
        ErrorKind::ConnectionRefused
        | ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::NotConnected
        | ErrorKind::BrokenPipe
        | ErrorKind::TimedOut
        | ErrorKind::Interrupted
        | ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable
        | ErrorKind::NetworkDown
        | ErrorKind::StaleNetworkFileHandle => ExitStatus::Transient,
        _ => ExitStatus::Unexpected,
    }
}

/// What a source comes to where no store is to blame.
fn source_status(error: &SourceError) -> ExitStatus {
    match error {
        SourceError::Predicate(_) => ExitStatus::Usage,
        _ => ExitStatus::Contract,
    }
}

/// What a model comes to where no store is to blame.
fn model_status(error: &ModelError) -> ExitStatus {
    match error {
        ModelError::Runtime(_) | ModelError::Provider { .. } | ModelError::LeftToCpu { .. } => ExitStatus::Resource,
        ModelError::Inference { .. } => ExitStatus::Unexpected,
        _ => ExitStatus::Contract,
    }
}

/// What a published table comes to where no store is to blame.
fn table_status(error: &TableError) -> ExitStatus {
    match error {
        TableError::Contention { .. } | TableError::Lapsed { .. } => ExitStatus::Transient,
        TableError::Read { .. }
        | TableError::Vector { .. }
        | TableError::OtherSchema { .. }
        | TableError::DuplicateIds { .. }
        | TableError::OtherLog { .. }
        | TableError::NewerFormat { .. } => ExitStatus::Contract,
        _ => ExitStatus::Unexpected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::errors::ParquetError;

    fn reset() -> object_store::Error {
        let source = Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        object_store::Error::Generic { store: "S3", source }
    }

    fn full() -> object_store::Error {
        let source = Box::new(std::io::Error::from(std::io::ErrorKind::StorageFull));
        object_store::Error::Generic { store: "LocalFileSystem", source }
    }

    fn written(source: ParquetError) -> Error {
        TableError::Write { url: "s3://lake/part.parquet".to_owned(), source }.into()
    }

    fn logged(source: KernelError) -> Error {
        TableError::Delta { action: "read", table: "s3://lake/latents".to_owned(), source: Box::new(source) }.into()
    }

    #[test]
    fn the_store_underneath_decides_however_deep_it_is_wrapped() {
        // The writer of data files sees the store through an adapter to streams.
        let through_stream = |answer: object_store::Error| ParquetError::from(std::io::Error::from(answer));
        assert_eq!(written(through_stream(reset())).exit_status(), ExitStatus::Transient);
        assert_eq!(written(through_stream(full())).exit_status(), ExitStatus::Resource);
        assert_eq!(logged(KernelError::ObjectStore(reset())).exit_status(), ExitStatus::Transient);
        assert_eq!(logged(KernelError::ObjectStore(full())).exit_status(), ExitStatus::Resource);
        let in_parquet = ParquetError::External(Box::new(reset()));
        assert_eq!(logged(KernelError::Parquet(in_parquet)).exit_status(), ExitStatus::Transient);
        let in_arrow = arrow::error::ArrowError::ExternalError(Box::new(reset()));
        assert_eq!(logged(KernelError::Arrow(in_arrow)).exit_status(), ExitStatus::Transient);
        let folder = std::io::Error::from(std::io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(logged(KernelError::IOError(folder)).exit_status(), ExitStatus::Resource);
    }

    #[test]
    fn credentials_are_told_of_however_deep_the_store_is_wrapped() {
        let refused = || object_store::Error::Unauthenticated { path: "x".to_owned(), source: "no".into() };
        for error in [
            Error::from(StoreError::Request { action: "read", url: "s3://lake/x".to_owned(), source: refused() }),
            logged(KernelError::ObjectStore(refused())),
            written(std::io::Error::from(refused()).into()),
        ] {
            assert_eq!(error.exit_status(), ExitStatus::Resource);
            assert!(error.hint().unwrap().contains("credentials"), "{:?}", error.hint());
        }
    }

    #[test]
    fn a_file_that_is_wrong_is_not_mistaken_for_a_store_that_failed() {
        let read = |source| Error::from(TableError::Read { url: String::new(), source });
        assert_eq!(read(ParquetError::General("bad magic".to_owned())).exit_status(), ExitStatus::Contract);
        let decoder = std::io::Error::new(std::io::ErrorKind::InvalidData, "corrupt block");
        assert_eq!(read(decoder.into()).exit_status(), ExitStatus::Contract);
        assert_eq!(logged(KernelError::generic("no such feature")).exit_status(), ExitStatus::Unexpected);
    }
}
