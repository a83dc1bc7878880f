use std::path::Path;
use std::sync::{Arc, LazyLock};

use object_store::prefix::PrefixStore;
use object_store::{DynObjectStore, PutMode, PutPayload, integration};

use crate::servers::{Bucket, azure, block_on, google, s3};
use crate::support::{Ran, cells, folder, lookalike, write};

/// Writers that race for an object.
const WRITERS: u32 = 16;

fn pipeline(table: &str, base: &str) -> String {
    format!(
        "[pipeline]\nname = \"cells\"\n[source]\ntable = \"{table}\"\ncolumns = [\"defect\", \"split\"]\n\
         [model]\npackage = \"{base}/model\"\n[anomaly]\nreference = \"{base}/reference.parquet\"\nthreshold = {{ contamination = 0.3 }}\n[output]\ntable = \"{base}/tables\"\n"
    )
}

/// Fits, calibrates, runs, runs again and evaluates; returns what came out.
fn journey(run: impl Fn(&[&str]) -> Ran) -> String {
    let file = "p.toml";
    run(&["fit", file, "--color", "gray", "--latent-dim", "32", "--where", "split = 'fit'"]).expect(0);
    run(&["calibrate", file, "--where", "split = 'calibrate'"]).expect(0);
    let summary = run(&["run", file]).expect(0).summary();
    assert_eq!((summary["status"].as_str(), summary["rows_ok"].as_u64()), (Some("committed"), Some(2624)));
    assert_eq!(run(&["run", file]).expect(0).summary()["status"], "nothing_to_do");
    let areas = run(&["evaluate", file, "--positive", "defect = 1", "--negative", "defect = 0", "--json"]).expect(0);
    let cell = run(&["explain", file, "cell0002"]).expect(0).stdout;
    // Run ids are of the files, which have other names and versions here and there.
    let cell: Vec<_> = cell.lines().filter(|line| !line.contains("run_id")).collect();
    format!("{}\n{}\n{}", summary["rows_flagged"], areas.stdout, cell.join("\n"))
}

/// What the journey comes to on the local disk.
static ON_DISK: LazyLock<String> = LazyLock::new(|| {
    let folder = folder();
    write(&folder.path().join("p.toml"), &pipeline(cells().to_str().unwrap(), "looked"));
    journey(|args| lookalike(folder.path(), args))
});

fn the_journey_through(bucket: &Bucket) {
    let folder = folder();
    for module in ["mono", "poly"] {
        let file = format!("module={module}/cells.parquet");
        bucket.upload(&cells().join(&file), &format!("journey/images/{file}"));
    }
    let base = format!("{}/journey", bucket.url);
    write(&folder.path().join("p.toml"), &pipeline(&format!("{base}/images"), &base));
    assert_eq!(journey(|args| bucket.lookalike(folder.path(), args)), *ON_DISK);
    // What is exported is the same wherever it goes.
    for to in [&format!("{base}/arrays"), "arrays"] {
        bucket.lookalike(folder.path(), &["export", "p.toml", "--format", "numpy", "--to", to]).expect(0);
    }
    for name in ["embeddings.npy", "rows.parquet"] {
        let on_disk = std::fs::read(folder.path().join("arrays").join(name)).unwrap();
        assert!(bucket.get(&format!("journey/arrays/{name}")) == on_disk, "{name} in {}", bucket.url);
    }
}

#[test]
fn the_journey_through_s3_gives_what_the_journey_on_disk_gives() {
    the_journey_through(&s3());
}

#[test]
fn the_journey_through_azure_gives_what_the_journey_on_disk_gives() {
    the_journey_through(&azure());
}

#[test]
fn the_journey_through_the_stand_in_for_google_gives_what_the_journey_on_disk_gives() {
    the_journey_through(&google());
}

#[test]
fn of_many_puts_of_an_object_where_there_is_none_one_succeeds_in_every_store() {
    for bucket in [s3(), azure(), google()] {
        for round in 0..5 {
            let path = format!("puts/{round}").into();
            let puts = (0..WRITERS).map(|writer| {
                let (client, path) = (bucket.client().clone(), &path);
                async move {
                    let bytes = PutPayload::from(format!("writer {writer}"));
                    client.put_opts(path, bytes, PutMode::Create.into()).await.map(|_| writer)
                }
            });
            let outcomes = block_on(futures::future::join_all(puts));
            let winners: Vec<_> = outcomes.iter().flatten().collect();
            assert_eq!(winners.len(), 1, "{}: {outcomes:?}", bucket.url);
            let refusals = outcomes.iter().filter(|put| matches!(put, Err(object_store::Error::AlreadyExists { .. })));
            assert_eq!(refusals.count() as u32, WRITERS - 1, "{}: {outcomes:?}", bucket.url);
            assert_eq!(bucket.get(path.as_ref()), format!("writer {}", winners[0]), "{}", bucket.url);
        }
    }
}

#[test]
fn the_stand_in_for_google_passes_what_the_client_library_asks_of_stores() {
    // The suite clears the store it is given.
    let store: Arc<DynObjectStore> = Arc::new(PrefixStore::new(Arc::clone(google().client()), "suite"));
    block_on(async {
        integration::put_get_delete_list(&store).await;
        integration::put_opts(&store, true).await;
        integration::list_uses_directories_correctly(&store).await;
        integration::list_with_delimiter(&store).await;
        integration::list_with_offset_exclusivity(&store).await;
        integration::stream_get(&store).await;
        integration::get_nonexistent_object(&store, None).await.unwrap_err();
    });
}

/// Runs `fit` with a secret that the server does not know.
fn refused(bucket: &Bucket, folder: &Path) {
    let url = &bucket.url;
    write(&folder.join("p.toml"), &pipeline(&format!("{url}/images/x.parquet"), &format!("{url}/looked")));
    let ran = bucket.lookalike(folder, &["fit", "p.toml"]).expect(6);
    assert!(ran.stderr.contains(&format!("{url}/images")) && ran.stderr.contains("hint: "), "{}", ran.stderr);
    for (_, secret) in bucket.variables.iter().filter(|(name, _)| name.ends_with("_KEY") || name.ends_with("TOKEN")) {
        assert!(!ran.stderr.contains(secret) && !ran.stdout.contains(secret), "{}", ran.stderr);
    }
}

#[test]
fn refused_credentials_are_a_missing_resource_and_the_secret_is_not_told() {
    let folder = folder();
    refused(&s3().with("AWS_SECRET_ACCESS_KEY", "wrong-canary-secret"), folder.path());
    // The key is base64, as Azure's are.
    refused(&azure().with("AZURE_STORAGE_ACCOUNT_KEY", "d3JvbmctY2FuYXJ5LXNlY3JldA=="), folder.path());
    refused(&google().with("GOOGLE_BEARER_TOKEN", "wrong-canary-secret"), folder.path());
}
