//! Locations: a path or a URL as a person writes it becomes an absolute URL without secrets.
//!
//! Nothing here opens a store or looks at a file system.

use std::path::{Component, Path, PathBuf};

use url::Url;

use crate::redact::{CONTAINER_SCHEMES, user_part};

/// URL schemes of the stores that can be read and written.
const SCHEMES: [&str; 8] = ["file", "memory", "s3", "s3a", "gs", "az", "abfs", "abfss"];

/// The scheme of web addresses. They are read like the others, for the secrets they often carry, and then refused: in them a container
/// is part of the path, which no store could tell from a folder.
const WEB_SCHEME: &str = "https";

/// Schemes of this machine, which have no host part.
const LOCAL_SCHEMES: [&str; 2] = ["file", "memory"];

/// Why a text is no usable location. None of the texts repeats the location, which may hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LocationFault {
    /// No text at all.
    #[error("is empty")]
    Empty,
    /// A user name or password before the host.
    #[error("carries credentials before the `@`")]
    Credentials,
    /// A query, which is where signatures and tokens travel.
    #[error("carries a query (`?…`), the place of signatures and tokens")]
    Query,
    /// A fragment, which a store would ignore.
    #[error("has a `#` part, which no store would see")]
    Fragment,
    /// A scheme that names none of the supported stores.
    #[error("has the unsupported scheme `{scheme}`")]
    Scheme {
        /// The scheme, lower case.
        scheme: String,
    },
    /// Text that looks like a URL and does not parse.
    #[error("is not a URL: {source}")]
    NotAUrl {
        /// What the URL parser found.
        source: url::ParseError,
    },
    /// A URL of a cloud store without a bucket, container or host.
    #[error("names no bucket")]
    NoBucket,
    /// A URL of this machine with a host, as `file://images` is.
    #[error("has a host, `{host}`, which a `{scheme}` URL cannot have")]
    Host {
        /// The scheme, lower case.
        scheme: String,
        /// The part after `//`.
        host: String,
    },
    /// A relative path below a folder that is not absolute itself.
    #[error("is a relative path, and the folder it starts from is not known")]
    Relative,
}

impl LocationFault {
    /// What to do about it.
    pub(crate) fn help(&self) -> String {
        match self {
            Self::Empty => "give a path, or a URL such as `s3://bucket/prefix`".to_owned(),
            Self::Credentials | Self::Query => {
                "leave them out: credentials come from the environment, in the standard variables of each cloud \
                 (AWS_…, GOOGLE_…, AZURE_…)"
                    .to_owned()
            }
            Self::Fragment => "write a `#` that is part of a name as `%23`".to_owned(),
            Self::Scheme { .. } => {
                let schemes: Vec<String> = SCHEMES.iter().map(|scheme| format!("{scheme}://")).collect();
                format!("supported are {} and paths", schemes.join(", "))
            }
            Self::NotAUrl { .. } | Self::NoBucket => {
                "write it as `s3://bucket/prefix`, or give a path without a scheme".to_owned()
            }
            Self::Host { scheme, .. } => {
                format!("write three slashes, `{scheme}:///absolute/path`, or give a path without a scheme")
            }
            Self::Relative => "give an absolute path or a URL".to_owned(),
        }
    }
}

/// The absolute URL of a location. Paths become `file://` URLs, relative ones below `base_dir`; `.` and `..` are resolved
/// by name, without following links. A slash at the end is dropped, so that one place has one spelling.
pub(crate) fn resolve(text: &str, base_dir: &Path) -> Result<Url, LocationFault> {
    if text.trim().is_empty() {
        return Err(LocationFault::Empty);
    }
    let mut url = match scheme_of(text) {
        Some(scheme) => parse_url(text, &scheme)?,
        None => file_url(&base_dir.join(text))?,
    };
    let path = url.path().trim_end_matches('/').to_owned();
    let is_local_root = path.is_empty() && LOCAL_SCHEMES.contains(&url.scheme());
    url.set_path(if is_local_root { "/" } else { &path });
    Ok(url)
}

/// Whether `inner` is `outer` or lies below it.
pub(super) fn is_inside(inner: &Url, outer: &Url) -> bool {
    // `s3a` is Hadoop's name for the same buckets.
    let store = |url: &Url| match url.scheme() {
        "s3a" => format!("s3://{}", url.authority()),
        scheme => format!("{scheme}://{}", url.authority()),
    };
    let inner_path = inner.path().trim_end_matches('/');
    let outer_path = outer.path().trim_end_matches('/');
    store(inner) == store(outer)
        && inner_path.strip_prefix(outer_path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The scheme, lower case, of a text that means to be a URL. A path has none.
fn scheme_of(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once(':')?;
    let scheme = scheme.to_ascii_lowercase();
    // `s3:/bucket` is a misspelled URL, `ds=12:00/cells` a path.
    (rest.starts_with("//") || SCHEMES.contains(&scheme.as_str()) || scheme == WEB_SCHEME).then_some(scheme)
}

fn parse_url(text: &str, scheme: &str) -> Result<Url, LocationFault> {
    // Before anything else: a password with a slash in it makes the URL unreadable, and must be called a password.
    let is_local = LOCAL_SCHEMES.contains(&scheme);
    let after_colon = text.split_once(':').map_or("", |(_, rest)| rest);
    let after_slashes = if is_local {
        // A third slash starts the path, in which `:` and `@` are ordinary.
        after_colon.strip_prefix("//").unwrap_or_default()
    } else {
        after_colon.trim_start_matches('/')
    };
    if user_part(scheme, after_slashes).is_some() {
        return Err(LocationFault::Credentials);
    }
    if !SCHEMES.contains(&scheme) && scheme != WEB_SCHEME {
        return Err(LocationFault::Scheme { scheme: scheme.to_owned() });
    }
    let url = Url::parse(text).map_err(|source| LocationFault::NotAUrl { source })?;
    let names_container = CONTAINER_SCHEMES.contains(&scheme);
    if url.password().is_some() || (!url.username().is_empty() && !names_container) {
        return Err(LocationFault::Credentials);
    }
    if url.query().is_some() {
        return Err(LocationFault::Query);
    }
    if url.fragment().is_some() {
        return Err(LocationFault::Fragment);
    }
    let host = url.host_str().unwrap_or_default();
    if is_local && !host.is_empty() {
        return Err(LocationFault::Host { scheme: scheme.to_owned(), host: host.to_owned() });
    }
    if !is_local && host.is_empty() {
        return Err(LocationFault::NoBucket);
    }
    if scheme == WEB_SCHEME {
        return Err(LocationFault::Scheme { scheme: scheme.to_owned() });
    }
    Ok(url)
}

fn file_url(path: &Path) -> Result<Url, LocationFault> {
    let mut resolved = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                resolved.pop();
            }
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => {
                resolved.push(component);
            }
        }
    }
    Url::from_file_path(resolved).map_err(|()| LocationFault::Relative)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_base(text: &str) -> Result<String, LocationFault> {
        resolve(text, Path::new("/jobs/solar")).map(String::from)
    }

    #[test]
    fn relative_paths_start_at_the_base_folder() {
        assert_eq!(at_base("images").unwrap(), "file:///jobs/solar/images");
        assert_eq!(at_base("./images/").unwrap(), "file:///jobs/solar/images");
        assert_eq!(at_base("../lake/a b").unwrap(), "file:///jobs/lake/a%20b");
        assert_eq!(at_base("/lake/images").unwrap(), "file:///lake/images");
        assert_eq!(at_base("ds=12:00").unwrap(), "file:///jobs/solar/ds=12:00");
        assert_eq!(resolve("images", Path::new("")), Err(LocationFault::Relative));
    }

    #[test]
    fn one_place_has_one_spelling() {
        assert_eq!(at_base("s3://lake/images/").unwrap(), "s3://lake/images");
        assert_eq!(at_base("s3://lake/").unwrap(), at_base("s3://lake").unwrap());
        assert_eq!(at_base("/").unwrap(), "file:///");
        assert_eq!(at_base("memory:///").unwrap(), "memory:///");
        assert_eq!(at_base("memory:///t/").unwrap(), "memory:///t");
    }

    #[test]
    fn the_urls_of_every_supported_store_are_kept() {
        for url in [
            "file:///lake/images",
            "file:///lake/ds=12:00/images@2026",
            "memory:///images",
            "s3://lake/images",
            "s3a://lake/images",
            "gs://lake/images",
            "az://container/images",
            "abfs://container@account.dfs.core.windows.net/images",
            "abfss://container@account.dfs.core.windows.net/images",
        ] {
            assert_eq!(at_base(url).unwrap(), url);
        }
    }

    #[test]
    fn a_web_address_is_no_store() {
        let fault = at_base("https://account.blob.core.windows.net/container/images").unwrap_err();
        assert_eq!(fault, LocationFault::Scheme { scheme: "https".to_owned() });
        assert!(fault.help().contains("az://"), "{}", fault.help());
    }

    #[test]
    fn unusable_urls_say_why() {
        let scheme = LocationFault::Scheme { scheme: "ftp".to_owned() };
        assert_eq!(at_base("ftp://lake/images"), Err(scheme));
        assert_eq!(at_base("s3:///images"), Err(LocationFault::NoBucket));
        assert_eq!(at_base("s3:/lake/images"), Err(LocationFault::NoBucket));
        assert_eq!(at_base("s3://lake/a#b"), Err(LocationFault::Fragment));
        assert_eq!(at_base("  "), Err(LocationFault::Empty));
        assert!(matches!(at_base("file://images/cells"), Err(LocationFault::Host { .. })));
        assert!(matches!(at_base("https://[lake/images"), Err(LocationFault::NotAUrl { .. })));
    }

    #[test]
    fn user_parts_and_queries_are_refused() {
        for url in [
            "s3://user:password@lake/images",
            "s3://user@lake/images",
            "s3://KEY:abc/def+g@lake/images",
            "s3://KEY:12/def@lake/images",
            "s3:/user:password@lake/images",
            "https:///user:password@lake/images",
            "https:\\\\user:password@lake/images",
            "file://user:password@localhost/images",
            "ftp://user:password@lake/images",
            "abfss://container:key@account.dfs.core.windows.net/images",
        ] {
            assert_eq!(at_base(url), Err(LocationFault::Credentials), "{url}");
        }
        for url in ["https://a.blob.core.windows.net/c/images?sig=secret", "s3://lake/images?X-Amz-Signature=secret"] {
            assert_eq!(at_base(url), Err(LocationFault::Query), "{url}");
        }
    }

    #[test]
    fn only_whole_names_make_a_prefix() {
        let inside = |inner: &str, outer: &str| {
            is_inside(&resolve(inner, Path::new("/")).unwrap(), &resolve(outer, Path::new("/")).unwrap())
        };
        assert!(inside("s3://lake/images/out", "s3://lake/images"));
        assert!(inside("s3a://lake/images", "s3://lake/images/"));
        assert!(inside("s3://lake/images", "s3://lake"));
        assert!(inside("out", "/"));
        assert!(!inside("s3://lake/images2", "s3://lake/images"));
        assert!(!inside("s3://lake/images", "s3://lake/images/out"));
        assert!(!inside("gs://lake/images", "s3://lake/images"));
        assert!(!inside("s3://other/images", "s3://lake/images"));
    }
}
