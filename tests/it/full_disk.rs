use std::path::Path;
use std::process::Command;

use lookalike::schema::TableName;

use crate::every_operation::MAY_DIFFER;
use crate::support::{Ran, folder, image_table, lookalike, rows, write};

/// The smallest disk, which holds no more than folders, and how much larger the next one is. Room on a tmpfs comes in pages of 4 KiB.
const FIRST_KIB: u32 = 4;
const STEP_KIB: usize = 16;

/// What is typed: runs with the output on a file system of `$1` bytes, makes room, runs again, and takes the tables out of it, for it
/// goes when the shell ends. A shell in a mount namespace of its own may mount, and nobody else sees it.
const SCRIPT: &str = r#"
set -e
mount -t tmpfs -o "size=$1" none disk
set +e
"$2" run p.toml > first.out 2> first.err; echo $? > first.code
set -e
mount -o remount,size=256m disk
set +e
"$2" run p.toml > second.out 2> second.err; echo $? > second.code
cp -r disk/out out
"#;

fn run_on_disk_of(folder: &Path, bytes: u32) -> [Ran; 2] {
    let unshare = |options: &[&str], args: &[&str]| {
        let ran = Command::new("unshare").current_dir(folder).args(options).args(args).output();
        ran.unwrap_or_else(|e| panic!("unshare (of util-linux) cannot be run: {e}"))
    };
    // Whoever may mount needs no user namespace, and may not be let have one.
    let may_mount = unshare(&["--mount"], &["true"]).status.success();
    let options: &[&str] = if may_mount { &["--mount"] } else { &["--user", "--map-root-user", "--mount"] };
    let args = ["sh", "-c", SCRIPT, "sh", &bytes.to_string(), env!("CARGO_BIN_EXE_lookalike")];
    let ran = unshare(options, &args);
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(
        ran.status.success(),
        "this test mounts a small disk of its own, for which the system must let it make a user and mount namespace \
         (kernel.unprivileged_userns_clone, or CAP_SYS_ADMIN in a container): {said}"
    );
    ["first", "second"].map(|run| {
        let text = |what: &str| std::fs::read_to_string(folder.join(format!("{run}.{what}"))).unwrap();
        Ran { code: text("code").trim().parse().unwrap(), stdout: text("out"), stderr: text("err") }
    })
}

#[test]
fn a_full_disk_is_exit_code_6_and_with_room_the_run_goes_on_to_the_same_rows() {
    let folder = folder();
    let folder = folder.path();
    let pipeline = |output: &str| {
        format!(
            "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n\
             [neighbors]\nk = 2\nduplicate_distance = 0.1\n[output]\ntable = \"{output}\"\n"
        )
    };
    for (day, seed) in [("1", 10), ("2", 20), ("3", 30)] {
        let rows: Vec<(String, i64)> = (0..8).map(|number| (format!("{day}-{number}"), seed + number)).collect();
        let rows: Vec<(&str, i64)> = rows.iter().map(|(id, seed)| (id.as_str(), *seed)).collect();
        image_table(&folder.join(format!("images/ds={day}/x.parquet")), &rows);
    }
    write(&folder.join("clean.toml"), &pipeline("clean"));
    write(&folder.join("p.toml"), &pipeline("disk/out"));
    let fit = ["fit", "clean.toml", "--latent-dim", "3", "--height", "8", "--width", "8"];
    lookalike(folder, &fit).expect(0);
    lookalike(folder, &["run", "clean.toml"]).expect(0);
    // The settings name the output, which is not the same.
    let except = [MAY_DIFFER.as_slice(), &["settings"]].concat();
    let tables = |folder: &Path| TableName::ALL.map(|table| rows(folder, table, &except));
    let clean = tables(&folder.join("clean"));
    std::fs::create_dir(folder.join("disk")).unwrap();
    let mut num_full = 0;
    // Full at the first log, among the data files, in a commit, at the record of the run; at last everything fits.
    for kib in (FIRST_KIB..).step_by(STEP_KIB) {
        let [first, second] = run_on_disk_of(folder, kib << 10);
        assert_eq!(tables(&folder.join("out")), clean, "{kib} KiB");
        std::fs::remove_dir_all(folder.join("out")).unwrap();
        if first.code == 0 {
            second.expect(0);
            break;
        }
        let full = first.expect(6);
        let error = full.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        println!("{kib} KiB: {error}");
        assert!(error.contains("disk/out/"), "{kib} KiB: {}", full.stderr);
        assert!(
            full.stderr.contains("because: ") && full.stderr.contains("No space left on device"),
            "{}",
            full.stderr
        );
        assert_eq!(second.expect(0).summary()["status"], "committed", "{kib} KiB");
        num_full += 1;
    }
    assert!(num_full >= 6, "{num_full} disks were too small");
}
