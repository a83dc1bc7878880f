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

/// The variable that keeps the library from telling its makers how it is used, from 1.32 on. Its interface has a call for that too, which
/// comes too late for the first message and for the files with an identifier that it puts into the home folder.
const TELEMETRY_VARIABLE: &str = "ORT_DISABLE_TELEMETRY";

/// Where `make` puts the library, below the folder that the command is called from.
const CHECKOUT_FOLDER: &str = ".cache/onnxruntime";

/// Where the Python packages have the library, below the folder of all packages.
const PACKAGE_FOLDER: &str = "onnxruntime/capi";

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
    /// `../lib` beside the program, the Python environment that the program was installed into (the packages in `../lib`, which
    /// `pip install`, with `--user` or without, fills beside it), `.cache/onnxruntime` below the working folder, the active Python
    /// environment, and the system's own loader.
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

/// Keeps the library from telling its makers how it is used, unless the environment says otherwise. To be called before there is a second
/// thread.
#[expect(unsafe_code, reason = "the environment is changed while nobody else can read it")]
pub fn refuse_telemetry() {
    if variable(TELEMETRY_VARIABLE).is_none() {
        // SAFETY: `main` calls this before anything else, so there is no other thread that reads the environment.
        unsafe { std::env::set_var(TELEMETRY_VARIABLE, "1") };
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
    // Of a link to the program, the path is that of the program itself: `pipx` and `uv` put links to it elsewhere.
    let mut folders = std::env::current_exe().map(|program| folders_beside(&program)).unwrap_or_default();
    folders.push((PathBuf::from(CHECKOUT_FOLDER), "the working folder"));
    if let Some(environment) = variable("VIRTUAL_ENV") {
        folders
            .extend(python_packages(&environment).into_iter().map(|folder| (folder, "the active Python environment")));
    }
    folders
}

/// The folders that belong to a program in `…/bin`: `…/lib`, and what Python has installed there.
fn folders_beside(program: &Path) -> Vec<(PathBuf, &'static str)> {
    let Some(prefix) = program.parent().and_then(Path::parent) else { return Vec::new() };
    let packages = python_packages(prefix).into_iter().map(|folder| (folder, "the program's Python environment"));
    std::iter::once((prefix.join("lib"), "beside the program")).chain(packages).collect()
}

/// `lib/python3.X/site-packages/onnxruntime/capi` below a Python environment, for each X that is there, the newest first. Fedora has
/// `lib64` for it, and Debian's own Python `dist-packages`.
fn python_packages(environment: &Path) -> Vec<PathBuf> {
    let entries =
        ["lib", "lib64"].into_iter().flat_map(|lib| std::fs::read_dir(environment.join(lib)).into_iter().flatten());
    let mut pythons: Vec<PathBuf> = entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
    pythons.sort_by_key(|python| std::cmp::Reverse(numbers(python)));
    let packages =
        |python: &PathBuf| ["site-packages", "dist-packages"].map(|name| python.join(name).join(PACKAGE_FOLDER));
    pythons.iter().flat_map(packages).filter(|folder| folder.is_dir()).collect()
}

/// The library file in a folder: `libonnxruntime.so`, or, as the Python packages have it, with a version behind, of which the newest.
/// Where the packages `onnxruntime` and `onnxruntime-gpu` are both installed, which share a folder, it is the latter's, which can all
/// that the former can.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| is_library(path))
        .collect();
    found.sort_by_key(|path| (numbers(path), path.clone()));
    let newest = found.pop()?;
    Some(gpu_library(folder).unwrap_or(newest))
}

/// Whether a file is the library itself: `libonnxruntime_providers_…` lie beside it.
fn is_library(path: &Path) -> bool {
    let prefix = format!("{}onnxruntime", std::env::consts::DLL_PREFIX);
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.strip_prefix(&prefix).is_some_and(|rest| rest.starts_with('.'))
}

/// The library that the package `onnxruntime-gpu` has put into a folder, by what pip has noted of it. Where the other package is of the
/// same version, and came later, it has written over it: then it is told how to get it back.
fn gpu_library(folder: &Path) -> Option<PathBuf> {
    let packages = folder.ancestors().nth(Path::new(PACKAGE_FOLDER).components().count())?;
    let notes = std::fs::read_dir(packages).ok()?.filter_map(Result::ok).map(|entry| entry.path()).find(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("onnxruntime_gpu-") && name.ends_with(".dist-info")
    })?;
    let record = std::fs::read_to_string(notes.join("RECORD")).ok()?;
    // A line is a path, a checksum, and the size in bytes.
    let (library, size): (PathBuf, u64) = record.lines().find_map(|line| {
        let (rest, size) = line.rsplit_once(',')?;
        let (path, _) = rest.rsplit_once(',')?;
        let path = packages.join(path);
        (path.parent() == Some(folder) && is_library(&path)).then_some((path, size.parse().ok()?))
    })?;
    if std::fs::metadata(&library).is_ok_and(|found| found.len() == size) {
        return Some(library);
    }
    tracing::warn!(
        library = %library.display(),
        "the package onnxruntime has written over that of onnxruntime-gpu, and cannot use a GPU: pip install --force-reinstall --no-deps \
         onnxruntime-gpu"
    );
    None
}

/// The numbers in a file's name, by which 1.9 comes before 1.10.
fn numbers(path: &Path) -> Vec<u64> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
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

    /// A folder with files of these sizes.
    fn tree(files: &[(&str, usize)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, size) in files {
            write(&root.path().join(path), &vec![b'.'; *size]);
        }
        root
    }

    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    fn write(path: &Path, bytes: &[u8]) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// The library that a program in `bin` below `root` takes, without its `root`, and how it was found.
    fn taken(root: &Path) -> Option<(String, &'static str)> {
        let (library, found_by) = folders_beside(&root.join("bin/lookalike"))
            .into_iter()
            .find_map(|(folder, found_by)| Some((library_in(&folder)?, found_by)))?;
        Some((library.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), found_by))
    }

    #[test]
    fn a_program_in_a_python_environment_finds_the_library_of_that_environment() {
        let by = "the program's Python environment";
        for packages in
            ["lib/python3.12/site-packages", "lib64/python3.13/site-packages", "lib/python3.11/dist-packages"]
        {
            let library = format!("{packages}/onnxruntime/capi/libonnxruntime.so.1.32.0");
            let beside = format!("{packages}/onnxruntime/capi/libonnxruntime_providers_shared.so");
            let root = tree(&[(&library, 1), (&beside, 1), ("lib/python3.9/site-packages/numpy/a", 1)]);
            assert_eq!(taken(root.path()), Some((library, by)));
        }
        // Such as `~/.local` after `pip install --user` by two versions of Python.
        let [newer, older] = ["3.10", "3.9"]
            .map(|python| format!("lib/python{python}/site-packages/onnxruntime/capi/libonnxruntime.so.1.24.1"));
        let root = tree(&[(&older, 1), (&newer, 1)]);
        assert_eq!(taken(root.path()), Some((newer.clone(), by)));
        // A library beside the program goes before those of Python, and the newer of two before the other.
        write(&root.path().join("lib/libonnxruntime.so.1.9.0"), b".");
        write(&root.path().join("lib/libonnxruntime.so.1.30.0"), b".");
        assert_eq!(taken(root.path()), Some(("lib/libonnxruntime.so.1.30.0".to_owned(), "beside the program")));
        assert_eq!(taken(tree(&[("lib/python3.12/site-packages/numpy/a", 1)]).path()), None);
    }

    #[test]
    fn of_two_packages_that_share_a_folder_the_library_is_that_of_the_one_for_gpus() {
        const PACKAGES: &str = "lib/python3.12/site-packages";
        let [gpu, cpu] =
            ["1.31.1", "1.32.0"].map(|version| format!("{PACKAGES}/onnxruntime/capi/libonnxruntime.so.{version}"));
        let root = tree(&[(&gpu, 30), (&cpu, 20)]);
        let record = root.path().join(PACKAGES).join("onnxruntime_gpu-1.31.1.dist-info/RECORD");
        let by = "the program's Python environment";
        assert_eq!(taken(root.path()), Some((cpu.clone(), by)));
        let noted = "onnxruntime/capi/libonnxruntime_providers_cuda.so,sha256=ab,7\n\
                     onnxruntime/capi/libonnxruntime.so.1.31.1,sha256=cd,30\nonnxruntime_gpu-1.31.1.dist-info/RECORD,,\n";
        write(&record, noted.as_bytes());
        assert_eq!(taken(root.path()), Some((gpu, by)));
        // Written over by the other package.
        write(&record, noted.replace(",30", ",31").as_bytes());
        assert_eq!(taken(root.path()), Some((cpu, by)));
    }
}
