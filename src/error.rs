//! What can end a command, and which exit code tells the scheduler what to do about it.

use crate::config::ConfigError;
use crate::model::{ModelError, RuntimeError};
use crate::source::SourceError;
use crate::store::StoreError;
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
    /// Something is missing on this machine: the runtime, the GPU, memory, disk.
    Resource = 6,
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
    Reference(Box<crate::flag::ReferenceError>),
    /// A model cannot be fitted.
    #[error(transparent)]
    Fit(Box<crate::commands::fit::FitError>),
    /// The neighbors cannot be computed.
    #[error("cannot compute the neighbors")]
    Neighbors(#[from] crate::neighbors::exact::JoinError),
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
    /// The pipeline file cannot be read.
    #[error("cannot read the pipeline file {file}")]
    PipelineFile {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
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
    Reference: crate::flag::ReferenceError,
    Fit: crate::commands::fit::FitError,
}

impl From<RuntimeError> for Error {
    fn from(error: RuntimeError) -> Self {
        ModelError::from(error).into()
    }
}

impl Error {
    /// The exit code.
    pub fn exit_status(&self) -> ExitStatus {
        match self {
            Self::Config(_) | Self::Usage { .. } | Self::PipelineFile { .. } => ExitStatus::Usage,
            Self::Store(error) => store_status(error.answer()),
            Self::Source(error) => source_status(error),
            Self::Model(error) => model_status(error),
            Self::Table(error) => table_status(error),
            Self::Reference(error) => match error.as_ref() {
                crate::flag::ReferenceError::Store(error) => store_status(error.answer()),
                _ => ExitStatus::Contract,
            },
            Self::Fit(_) => ExitStatus::Contract,
            Self::Neighbors(_) | Self::Rows { .. } | Self::Frame { .. } => ExitStatus::Unexpected,
            Self::Io { source, .. } => io_status(source),
        }
    }

    /// What the user can do about it, where there is more to say than the message does.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Usage { hint, .. } => Some(hint.clone()),
            Self::Store(error) => error.hint(),
            Self::Source(error) => error.hint(),
            Self::Model(error) => error.hint(),
            Self::Table(error) => error.hint(),
            Self::Reference(error) => error.hint(),
            Self::Fit(error) => error.hint(),
            _ => None,
        }
    }
}

/// A store's answer: what is not there is not as agreed; credentials and disks are this machine's matter; all else may pass.
fn store_status(answer: &object_store::Error) -> ExitStatus {
    use object_store::Error as Answer;
    if matches!(answer, Answer::NotFound { .. }) {
        return ExitStatus::Contract;
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
        Answer::PermissionDenied { .. } | Answer::Unauthenticated { .. } => ExitStatus::Resource,
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
        _ => ExitStatus::Unexpected,
    }
}

fn parquet_status(error: &parquet::errors::ParquetError) -> ExitStatus {
    crate::parquet_file::store_answer(error).map_or(ExitStatus::Contract, store_status)
}

fn source_status(error: &SourceError) -> ExitStatus {
    match error {
        SourceError::Store(error) => store_status(error.answer()),
        SourceError::Parquet { source, .. } => parquet_status(source),
        SourceError::Predicate(_) => ExitStatus::Usage,
        _ => ExitStatus::Contract,
    }
}

fn model_status(error: &ModelError) -> ExitStatus {
    match error {
        ModelError::Store(error) => store_status(error.answer()),
        ModelError::Runtime(_) | ModelError::Provider { .. } => ExitStatus::Resource,
        ModelError::Inference { .. } => ExitStatus::Unexpected,
        _ => ExitStatus::Contract,
    }
}

fn table_status(error: &TableError) -> ExitStatus {
    match error {
        TableError::Store(error) => store_status(error.answer()),
        TableError::Contention { .. } => ExitStatus::Transient,
        TableError::Delta { source, .. } => match source.as_ref() {
            delta_kernel::KernelError::ObjectStore(answer) => store_status(answer),
            delta_kernel::KernelError::IOError(error) => io_status(error),
            _ => ExitStatus::Unexpected,
        },
        TableError::Write { source, .. } | TableError::Read { source, .. } => parquet_status(source),
        TableError::Receipt { .. } | TableError::RowCount { .. } => ExitStatus::Unexpected,
        TableError::OtherSchema { .. } | TableError::DuplicateIds { .. } => ExitStatus::Contract,
    }
}
