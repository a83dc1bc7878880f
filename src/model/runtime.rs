//! ONNX Runtime, loaded at run time: where its library is looked for, in which order, and which one was taken.
//!
//! The library is not linked, so that one binary serves the CPU and the CUDA builds of it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

use ort::environment::Environment;
use ort::ep::cuda::{CUDA_DYLIBS, CUDNN_DYLIBS};
use ort::util::preload_dylib;

/// The variable by which users of `ort` everywhere name the library.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Where `make` puts the library, below the folder that the command is called from.
const CHECKOUT_FOLDER: &str = ".cache/onnxruntime";

/// The command that gets a library where none is found.
const INSTALL_COMMAND: &str = "python3 -m venv .venv && . .venv/bin/activate && pip install onnxruntime";

/// The library cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// No place had one.
    #[error("ONNX Runtime was not found; looked at {}", looked_at.join(", "))]
    NotFound {
        /// The places, in order.
        looked_at: Vec<String>,
    },
    /// A place that the user named has none.
    #[error("there is no ONNX Runtime library at {path} ({found_by})")]
    NamedMissing {
        /// The path named.
        path: PathBuf,
        /// How it was named.
        found_by: &'static str,
    },
    /// The library is there and does not load, or is too old.
    #[error("cannot load ONNX Runtime from {library}")]
    Load {
        /// The library.
        library: PathBuf,
        /// What the loader says.
        source: ort::LoadDynamicError,
    },
    /// The library loads and does not start.
    #[error("cannot start ONNX Runtime from {library}")]
    Start {
        /// The library.
        library: PathBuf,
        /// What it says.
        source: ort::Error,
    },
    /// One process can hold one library only.
    #[error("this process runs ONNX Runtime from {loaded} already, and cannot load {library} too")]
    AnotherLoaded {
        /// The first library.
        loaded: PathBuf,
        /// The second one.
        library: PathBuf,
    },
}

impl RuntimeError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { .. } | Self::NamedMissing { .. } => {
                Some(format!("get it with: {INSTALL_COMMAND}; or name the library file in {LIBRARY_VARIABLE}"))
            }
            Self::Load { .. } => Some("lookalike needs ONNX Runtime 1.24 or later".to_owned()),
            Self::Start { .. } | Self::AnotherLoaded { .. } => None,
        }
    }
}

/// ONNX Runtime, started.
#[derive(Debug, Clone)]
pub struct Runtime {
    environment: Environment,
    /// The library file.
    pub library: PathBuf,
    /// Which of the places it was found in.
    pub found_by: &'static str,
    /// Its version, such as `1.32.0`.
    pub version: String,
}

/// The library that this process has loaded; there can be one only.
static LOADED: Mutex<Option<Runtime>> = Mutex::new(None);

impl Runtime {
    /// Finds, loads and starts the library. Places, in order: `named` (a flag), the variable `ORT_DYLIB_PATH`, the folder
    /// `../lib` beside the program (with the Python packages in it), `.cache/onnxruntime` below the working folder, the active
    /// Python environment, and the system's own loader.
    pub fn load(named: Option<&Path>) -> Result<Self, RuntimeError> {
        let (library, found_by) = find(named)?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = &*loaded {
            if loaded.library == library {
                return Ok(loaded.clone());
            }
            return Err(RuntimeError::AnotherLoaded { loaded: loaded.library.clone(), library });
        }
        // It looks for the libraries of its providers where it was loaded from, which a link to it is not.
        let environment = ort::init_from(library.canonicalize().unwrap_or_else(|_| library.clone()))
            .map_err(|source| RuntimeError::Load { library: library.clone(), source })?
            .with_telemetry(false)
            .build()
            .map_err(|source| RuntimeError::Start { library: library.clone(), source })?;
        let runtime = Self { environment, version: version(&library), library, found_by };
        tracing::debug!(library = %runtime.library.display(), found_by, version = runtime.version, "loaded ONNX Runtime");
        *loaded = Some(runtime.clone());
        Ok(runtime)
    }

    /// Loads the libraries of CUDA and cuDNN that lie in the same Python environment, as `pip install onnxruntime-gpu[cuda,cudnn]`
    /// puts them there: the system's loader does not look in it. What is missing is left to that loader.
    pub(super) fn preload_cuda(&self) {
        static PRELOAD: Once = Once::new();
        PRELOAD.call_once(|| {
            let library = self.library.canonicalize().unwrap_or_else(|_| self.library.clone());
            // site-packages/onnxruntime/capi/libonnxruntime.so
            let Some(packages) = library.ancestors().nth(3) else { return };
            let in_folder = |folder: &'static str| move |name: &&str| packages.join(folder).join(name);
            let cuda = CUDA_DYLIBS.iter().map(in_folder("nvidia/cu13/lib"));
            for file in cuda.chain(CUDNN_DYLIBS.iter().map(in_folder("nvidia/cudnn/lib"))).filter(|file| file.is_file())
            {
                if let Err(error) = preload_dylib(&file) {
                    tracing::warn!(file = %file.display(), %error, "cannot be loaded");
                }
            }
        });
    }

    /// The environment that sessions are built in.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }
}

fn find(named: Option<&Path>) -> Result<(PathBuf, &'static str), RuntimeError> {
    let variable = variable(LIBRARY_VARIABLE);
    let named = named.map(|path| (path.to_owned(), "by --onnxruntime"));
    if let Some((path, found_by)) = named.or_else(|| variable.map(|path| (path, LIBRARY_VARIABLE))) {
        return if path.is_file() { Ok((path, found_by)) } else { Err(RuntimeError::NamedMissing { path, found_by }) };
    }
    let mut looked_at = Vec::new();
    for (folder, found_by) in folders() {
        if let Some(library) = library_in(&folder) {
            return Ok((library, found_by));
        }
        looked_at.push(folder.display().to_string());
    }
    // dlopen knows places that we do not; it is asked last because it alone does not say where it looked.
    let system = PathBuf::from(format!("{}onnxruntime{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX));
    if ort::init_from(&system).is_ok() {
        return Ok((system, "the system's library path"));
    }
    looked_at.push("the system's library path".to_owned());
    Err(RuntimeError::NotFound { looked_at })
}

#[expect(clippy::disallowed_methods, reason = "the library's place is part of the environment, and read here alone")]
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var(name).ok().filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The folders to look in, with the words by which they are reported.
fn folders() -> Vec<(PathBuf, &'static str)> {
    let mut folders = Vec::new();
    if let Some(prefix) = std::env::current_exe().ok().as_deref().and_then(Path::parent).and_then(Path::parent) {
        folders.push((prefix.join("lib"), "beside the program"));
        folders.extend(python_packages(prefix).map(|folder| (folder, "the program's Python environment")));
    }
    folders.push((PathBuf::from(CHECKOUT_FOLDER), "the working folder"));
    if let Some(environment) = variable("VIRTUAL_ENV") {
        folders.extend(python_packages(&environment).map(|folder| (folder, "the active Python environment")));
    }
    folders
}

/// `lib/python3.X/site-packages/onnxruntime/capi` below a Python environment, for each X that is there.
fn python_packages(environment: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(environment.join("lib"))
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .map(|entry| entry.path().join("site-packages/onnxruntime/capi"))
        .filter(|folder| folder.is_dir())
        .collect();
    found.sort();
    found.into_iter()
}

/// The library file in a folder: `libonnxruntime.so`, or, as the Python packages have it, with a version behind.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let prefix = format!("{}onnxruntime", std::env::consts::DLL_PREFIX);
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            // `libonnxruntime_providers_…` lie beside it.
            name.strip_prefix(&prefix).is_some_and(|rest| rest.starts_with('.'))
        })
        .collect();
    found.sort();
    found.pop()
}

/// The version, from the build information (`git-branch=rel-1.32.0`) or, where a packager left that out, the file's name.
fn version(library: &Path) -> String {
    let info = ort::info();
    let branch = info.split("git-branch=rel-").nth(1).and_then(|rest| rest.split(',').next());
    let name = library.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let suffix = name.split(".so.").nth(1);
    branch.or(suffix).unwrap_or("of unknown version").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_that_was_named_is_an_error_that_names_it_and_the_way_to_get_one() {
        let error = find(Some(Path::new("/nowhere/libonnxruntime.so"))).unwrap_err();
        assert!(error.to_string().contains("/nowhere/libonnxruntime.so"));
        assert!(error.hint().unwrap().contains("pip install onnxruntime"));
    }
}
