use crate::support::{folder, image_table, lookalike, python, write};

#[test]
fn a_run_fits_a_small_terminal_and_is_plain_text_elsewhere() {
    let folder = folder();
    let path = folder.path();
    let ids: Vec<String> =
        (0..40).map(|row| format!("a picture of a long name, which no row of a table has room for {row}")).collect();
    for day in 1..=2 {
        let rows: Vec<(&str, i64)> =
            ids.iter().zip(0..).map(|(id, row)| (id.as_str(), if row == 7 { -1 } else { day + row % 38 })).collect();
        image_table(&path.join(format!("images/ds={day}/x.parquet")), &rows);
    }
    write(
        &path.join("p.toml"),
        "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\ncolumns = [\"label\"]\n[model]\npackage = \"model\"\n\
         [output]\ntable = \"out\"\n[limits]\nmax_rejected_fraction = 0.5\n[neighbors]\nk = 5\nduplicate_distance = 1e-6\n",
    );
    lookalike(path, &["fit", "p.toml", "--latent-dim", "4", "--height", "8", "--width", "8"]).expect(0);
    python("terminal.py", &[env!("CARGO_BIN_EXE_lookalike").as_ref(), &path.join("p.toml")]);
}
