use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array as _, ArrayRef, AsArray as _, BinaryArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::NullBuffer;
use arrow::datatypes::{DataType, Field, FieldRef, Int32Type};
use lookalike::config::Pipeline;
use lookalike::schema::TableName;
use lookalike::source::{Cells, Read, ReadOptions, Selection, Slice, Source, SourcePartition, WorkUnit};
use lookalike::store::Stores;

use crate::support::{batches, cells, folder, image_table, lookalike, peak_memory, picture, python, rows, write};

/// Image id and the rest of each row of `latents`, by what the image holds: ids differ in form between the shapes.
fn latents(tables: &Path) -> BTreeMap<String, (String, String)> {
    let of =
        |row: &str, name: &str| row.split(&format!("{name}=")).nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let found: BTreeMap<_, _> = rows(tables, TableName::Latents, &["run_id", "status", "error_message"])
        .iter()
        .map(|row| {
            let (hash, id) = (of(row, "content_sha256"), of(row, "image_id"));
            let rest = row.split_once(&format!(" image_id={id} ")).unwrap().1.to_owned();
            (hash, (id, rest))
        })
        .collect();
    assert_eq!(found.len(), rows(tables, TableName::Latents, &[]).len(), "all pictures are different");
    found
}

#[test]
fn the_same_images_give_the_same_latents_in_every_shape() {
    let folder = folder();
    let pictures = folder.path().join("pictures");
    python("source_shapes.py", &[&pictures, &cells()]);
    lookalike(folder.path(), &["run", "--images", "pictures/folder", "--out", "folder"]).expect(0);
    let expected = latents(&folder.path().join("folder"));
    assert_eq!(expected.len(), 60);
    let shapes: Vec<_> = std::fs::read_dir(&pictures)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "folder" && !name.ends_with(".json"))
        .collect();
    assert!(shapes.len() >= 30, "{shapes:?}");
    for shape in shapes {
        let source = match shape.split('_').next().unwrap() {
            "tar" => "format = \"webdataset\"",
            "delta" => "format = \"delta\"",
            "int64" => "id = \"number\"",
            _ => "",
        };
        write(
            &folder.path().join(format!("{shape}.toml")),
            &format!(
                "[pipeline]\nname = \"shape\"\n[source]\ntable = \"pictures/{shape}\"\n{source}\n[model]\npackage = \"folder/model\"\n\
                 [output]\ntable = \"out/{shape}\"\n"
            ),
        );
        lookalike(folder.path(), &["run", &format!("{shape}.toml")]).expect(0);
        let found = latents(&folder.path().join(format!("out/{shape}")));
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{shape}");
        for ((id, latents), (expected_id, expected)) in found.values().zip(expected.values()) {
            assert_eq!(latents, expected, "{shape}");
            if shape.starts_with("tar") {
                assert_eq!(Some(id.as_str()), expected_id.strip_suffix(".png"), "{shape}");
            } else if !shape.contains("int64") {
                assert_eq!(id, expected_id, "{shape}");
            }
        }
    }
}

/// Pictures in shards, and a model that was fitted to some of them.
fn odd_shards() -> (tempfile::TempDir, String) {
    let folder = folder();
    let expected = python("odd_shards.py", &[folder.path()]);
    shard_pipeline(folder.path(), "fit", "cut/whole.tar", "");
    lookalike(folder.path(), &["fit", "fit.toml", "--latent-dim", "2", "--height", "8", "--width", "8"]).expect(0);
    (folder, expected)
}

fn shard_pipeline(folder: &Path, name: &str, table: &str, source: &str) {
    write(
        &folder.join(format!("{name}.toml")),
        &format!(
            "[pipeline]\nname = \"shards\"\n[source]\ntable = \"{table}\"\nformat = \"webdataset\"\n{source}\n\
             [model]\npackage = \"model\"\n[neighbors]\nenabled = false\n[output]\ntable = \"out/{name}\"\n\
             [limits]\nmax_rejected_fraction = 1.0\nmax_image_bytes = \"1MiB\"\n"
        ),
    );
}

/// Partition, id, status and kept text of each row of `latents`.
fn samples(tables: &Path) -> Vec<(String, String, String, Option<String>)> {
    let mut found = Vec::new();
    for (partition, batch) in batches(tables, TableName::Latents) {
        let texts = |name: &str| batch.column_by_name(name).map(|column| column.as_string::<i32>().clone());
        let (ids, status, txt) = (texts("image_id").unwrap(), texts("status").unwrap(), texts("txt"));
        for row in 0..batch.num_rows() {
            let txt = txt.as_ref().filter(|txt| txt.is_valid(row)).map(|txt| txt.value(row).to_owned());
            found.push((partition.clone(), ids.value(row).to_owned(), status.value(row).to_owned(), txt));
        }
    }
    found
}

#[test]
fn members_make_samples_by_their_names_in_every_dialect_of_tar() {
    let (folder, expected) = odd_shards();
    let expected: BTreeMap<String, serde_json::Value> = serde_json::from_str(&expected).unwrap();
    assert!(expected.len() > 10);
    shard_pipeline(folder.path(), "names", "names", "columns = [\"txt\"]");
    let plan = lookalike(folder.path(), &["plan", "names.toml"]).expect(0);
    assert!(plan.stderr.contains("rows not counted yet"), "{}", plan.stderr);
    lookalike(folder.path(), &["run", "names.toml"]).expect(0);
    let found = samples(&folder.path().join("out/names"));
    assert_eq!(found.len(), 3 * expected.len());
    for (partition, id, status, txt) in found {
        assert_eq!(status, expected[&id]["status"], "{partition} {id}");
        assert_eq!(txt.as_deref(), expected[&id]["txt"].as_str(), "{partition} {id}");
    }
    assert_eq!(lookalike(folder.path(), &["run", "names.toml"]).expect(0).summary()["status"], "nothing_to_do");

    // A predicate may ask for keys, texts and partitions.
    shard_pipeline(folder.path(), "where", "names", "columns = [\"txt\"]");
    let predicate = "form <> 'pax' AND (image_id LIKE 'a%' OR txt = '')";
    lookalike(folder.path(), &["run", "where.toml", "--where", predicate]).expect(0);
    let found = samples(&folder.path().join("out/where"));
    let found: Vec<_> = found.iter().map(|(partition, id, ..)| (partition.as_str(), id.as_str())).collect();
    let ids = ["a/b", "a.x/b", "last"];
    assert_eq!(found, ["form=gnu", "form=ustar"].map(|form| ids.map(|id| (form, id))).concat());
    let wrong = lookalike(folder.path(), &["run", "where.toml", "--where", "text = ''"]).expect(4);
    assert!(wrong.stderr.contains("did you mean `txt`?"), "{}", wrong.stderr);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
fn a_broken_shard_is_named_with_its_place_and_nothing_is_published() {
    let (folder, _) = odd_shards();
    let folder = folder.path();
    let whole = std::fs::read(folder.join("cut/whole.tar")).unwrap();
    shard_pipeline(folder, "cut", "cut", "columns = [\"txt\"]");
    std::fs::rename(folder.join("cut/whole.tar"), folder.join("cut/_whole.tar")).unwrap();
    let shard = folder.join("cut/x.tar");
    // Cut off in the image of the second sample and of the first; and with a header that is none. A sample takes 2560 bytes.
    let mut no_header = whole.clone();
    no_header[2560..3072].fill(b'-');
    for (bytes, place) in [
        (&whole[..3200], "at byte 3200 of the archive, member `k1.png`"),
        (&whole[..700], "at byte 700 of the archive, member `k0.png`"),
        (&no_header[..], "at byte 3072 of the archive\n"),
    ] {
        std::fs::write(&shard, bytes).unwrap();
        let ran = lookalike(folder, &["run", "cut.toml"]).expect(4);
        assert!(ran.stderr.contains("cut/x.tar") && ran.stderr.contains(place), "{}", ran.stderr);
        assert!(!folder.join("out/cut/latents").exists() || live_files(folder, "cut") == 0);
    }
    // Without the marker at its end the archive is as good as GNU tar takes it for.
    std::fs::write(&shard, &whole[..8 * 2560]).unwrap();
    lookalike(folder, &["run", "cut.toml"]).expect(0);
    assert_eq!(samples(&folder.join("out/cut")).len(), 8);
}

fn live_files(folder: &Path, out: &str) -> usize {
    let log = std::fs::read_dir(folder.join("out").join(out).join("latents/_delta_log")).unwrap();
    log.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap().matches("{\"add\":").count()).sum()
}

#[test]
fn a_key_in_two_shards_is_named() {
    let (folder, _) = odd_shards();
    shard_pipeline(folder.path(), "twice", "twice", "");
    let ran = lookalike(folder.path(), &["run", "twice.toml"]).expect(4);
    assert!(ran.stderr.contains("2 ids") && ran.stderr.contains("same, too"), "{}", ran.stderr);
}

#[test]
fn members_of_zeros_are_rows_and_take_no_memory() {
    let (folder, _) = odd_shards();
    let peak = |name: &str, table: &str| -> u64 {
        shard_pipeline(folder.path(), name, table, "columns = [\"txt\"]");
        let pipeline = format!("{name}.toml");
        peak_memory(folder.path(), &["run", &pipeline], 0).1
    };
    let (small, bombs) = (peak("small", "small"), peak("bombs", "bombs"));
    println!("peak resident set: {small} KiB without, {bombs} KiB with three members of 300 MiB in two shards");
    assert!(bombs < small + 64 * 1024);
    for (partition, id, status, txt) in samples(&folder.path().join("out/bombs")) {
        let expected = if id == "bomb" { ("image_too_large", None) } else { ("ok", Some(format!("text of {id}"))) };
        assert_eq!((status.as_str(), txt), expected, "{partition} {id}");
    }
}

#[test]
fn a_row_group_larger_than_the_memory_limit_is_read_in_blocks() {
    const ROWS: usize = 600;
    const CELL_BYTES: usize = 512 << 10;
    let (folder, small) = (folder(), folder());
    let table = |folder: &Path, num_rows: usize| {
        let mut random = fastrand::Rng::with_seed(7);
        let cells =
            (0..num_rows).map(|_| std::iter::repeat_with(|| random.u8(..)).take(CELL_BYTES).collect::<Vec<u8>>());
        let rows = RecordBatch::try_from_iter([
            ("image_id", Arc::new((0..num_rows).map(|row| Some(row.to_string())).collect::<StringArray>()) as ArrayRef),
            ("image", Arc::new(BinaryArray::from_iter_values(cells))),
        ]);
        let rows = rows.unwrap();
        std::fs::create_dir_all(folder.join("images")).unwrap();
        let file =
            std::fs::OpenOptions::new().write(true).create_new(true).open(folder.join("images/0.parquet")).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(file, rows.schema(), None).unwrap();
        writer.write(&rows).unwrap();
        assert_eq!(writer.close().unwrap().num_row_groups(), 1);
        image_table(&folder.join("pictures/0.parquet"), &[("a", 1), ("b", 2), ("c", 3), ("d", 4)]);
        let pipeline = |table: &str| {
            format!(
                "[pipeline]\nname = \"p\"\n[source]\ntable = \"{table}\"\n[model]\npackage = \"model\"\n\
                 [execution]\nworkers = 2\nmemory_limit = \"128MiB\"\n[output]\ntable = \"out\"\n"
            )
        };
        write(&folder.join("fit.toml"), &pipeline("pictures"));
        write(&folder.join("p.toml"), &pipeline("images"));
        lookalike(folder, &["fit", "fit.toml", "--latent-dim", "2", "--width", "8", "--height", "8"]).expect(0);
        // None of the cells is a picture.
        let (ran, resident_kib) = peak_memory(folder, &["embed", "p.toml"], 3);
        assert!(ran.stdout.contains(&format!("\"unknown_format\":{num_rows}")), "{}", ran.stdout);
        resident_kib
    };
    let (few, many) = (table(small.path(), ROWS / 2), table(folder.path(), ROWS));
    println!("peak resident set: {few} KiB with a row group of 150 MiB, {many} KiB with one of 300 MiB");
    assert!(many < few + few / 4 && many < 256 << 10, "{few} KiB and {many} KiB");
}

/// How a partition whose value is null is called.
const NO_DAY: &str = "__HIVE_DEFAULT_PARTITION__";

#[test]
fn a_delta_table_is_read_as_its_log_has_it() {
    let folder = folder();
    let folder = folder.path();
    let table = folder.join("images");
    let others = |action: &str| python("delta_table.py", &[Path::new(action), &table]);
    others("create");
    write(
        &folder.join("p.toml"),
        "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\nformat = \"delta\"\ncolumns = [\"label\"]\n\
         [model]\npackage = \"model\"\n[neighbors]\nenabled = false\n[output]\ntable = \"out\"\n",
    );
    lookalike(folder, &["fit", "p.toml", "--latent-dim", "2", "--height", "8", "--width", "8"]).expect(0);
    let run = || lookalike(folder, &["run", "p.toml"]).expect(0).summary();
    let ids = |out: &str| -> Vec<String> {
        let mut ids: Vec<String> = batches(&folder.join(out), TableName::Latents)
            .iter()
            .flat_map(|(partition, batch)| {
                let ids = batch.column_by_name("image_id").unwrap().as_string::<i32>();
                let labels = batch.column_by_name("label").unwrap().as_primitive::<Int32Type>();
                ids.iter()
                    .zip(labels)
                    .map(|(id, label)| {
                        assert_eq!(id, label.map(|label| format!("id{label:02}")).as_deref());
                        format!("{partition} {}", id.unwrap())
                    })
                    .collect::<Vec<_>>()
            })
            .collect();
        ids.sort();
        ids
    };
    let expected = |numbers: &[(&str, &[u32])]| -> Vec<String> {
        let of = |&(ds, numbers): &(&str, &[u32])| numbers.iter().map(|id| format!("ds={ds} id{id:02}")).collect();
        numbers.iter().flat_map(of as fn(&(&str, &[u32])) -> Vec<String>).collect()
    };
    let (day_1, day_2, none): (Vec<u32>, Vec<u32>, Vec<u32>) =
        ((0..8).collect(), (10..16).collect(), (20..25).collect());
    assert_eq!(run()["rows_in"], 19);
    assert_eq!(ids("out"), expected(&[("2026-11-01", &day_1), ("2026-11-02", &day_2), (NO_DAY, &none)]));

    // A commit that changes no row changes nothing here; a new file changes its own partition alone.
    others("touch");
    assert_eq!(run()["status"], "nothing_to_do");
    others("append");
    run();
    let day_2: Vec<u32> = day_2.into_iter().chain(30..33).collect();
    assert_eq!(ids("out"), expected(&[("2026-11-01", &day_1), ("2026-11-02", &day_2), (NO_DAY, &none)]));
    let of_run = |version: u64| -> Vec<String> {
        let rows = rows(&folder.join("out"), TableName::Runs, &[]);
        rows.into_iter().filter(|row| row.contains(&format!("source_version={version} "))).collect()
    };
    assert_eq!(of_run(2).len(), 3);

    // Rows that are deleted, by a new file or by a deletion vector, are not rows any more.
    others("delete");
    run();
    let (day_1, none) = (day_1.into_iter().filter(|id| *id != 3).collect::<Vec<_>>(), vec![21, 22, 23]);
    let left = expected(&[("2026-11-01", &day_1), ("2026-11-02", &day_2), (NO_DAY, &none)]);
    assert_eq!(ids("out"), left);
    let plan = lookalike(folder, &["plan", "p.toml", "--json"]).expect(0).summary();
    let planned = plan["partitions"].as_array().unwrap().iter().map(|partition| partition["rows"].as_u64().unwrap());
    assert_eq!(planned.collect::<Vec<_>>(), [3, 7, 9]);

    // Predicates on partition columns, on values, and on both.
    let wanted =
        lookalike(folder, &["run", "p.toml", "--out", "some", "--where", "ds IS NULL OR label > 13"]).expect(0);
    assert_eq!(wanted.summary()["rows_in"], 3 + 5);
    assert_eq!(ids("some"), expected(&[("2026-11-02", &[14, 15, 30, 31, 32]), (NO_DAY, &none)]));

    // Row groups that cannot satisfy it are not planned.
    let plan = lookalike(folder, &["plan", "p.toml", "--json", "--where", "label > 13"]).expect(0).summary();
    let planned = plan["partitions"].as_array().unwrap().iter().map(|partition| partition["rows"].as_u64().unwrap());
    assert_eq!(planned.collect::<Vec<_>>(), [3, 0, 9]);

    // Files that were written before a column was added have nulls there.
    let evolved = std::fs::read_to_string(folder.join("p.toml")).unwrap();
    let evolved = evolved.replace("[\"label\"]", "[\"label\", \"note\"]").replace("\"out\"", "\"evolved\"");
    write(&folder.join("evolved.toml"), &evolved);
    assert_eq!(lookalike(folder, &["run", "evolved.toml"]).expect(0).summary()["rows_in"], 19);
    let notes = rows(&folder.join("evolved"), TableName::Latents, &[]);
    assert_eq!(notes.iter().filter(|row| row.contains("note=new ")).count(), 3);
    assert_eq!(notes.iter().filter(|row| row.contains("note=NULL ")).count(), 16);
    for (predicate, expected) in [("note IS NULL", 16), ("note = 'new'", 3)] {
        let all = ["run", "evolved.toml", "--out", &format!("evolved{expected}"), "--where", predicate];
        assert_eq!(lookalike(folder, &all).expect(0).summary()["rows_in"], expected);
    }

    // As plain Parquet the removed rows would come back; the error says what to do.
    let plain = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n[output]\ntable = \"plain\"\n";
    write(&folder.join("plain.toml"), plain);
    let ran = lookalike(folder, &["run", "plain.toml"]).expect(4);
    assert!(ran.stderr.contains("format = \"delta\""), "{}", ran.stderr);
    write(&folder.join("none.toml"), &plain.replace("\"images\"", "\"model\"\nformat = \"delta\""));
    let ran = lookalike(folder, &["run", "none.toml"]).expect(4);
    assert!(ran.stderr.contains("no Delta log"), "{}", ran.stderr);
    others("rename");
    let ran = lookalike(folder, &["run", "p.toml"]).expect(4);
    assert!(ran.stderr.contains("column mapping") && ran.stderr.contains("delta.columnMapping.mode"), "{}", ran.stderr);
    assert_eq!(ids("out"), left);
}

#[test]
fn parts_of_a_source_are_read_by_file_and_by_id() {
    let folder = folder();
    python("source_shapes.py", &[folder.path()]);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for (shape, format) in [
        ("folder", "directory"),
        ("small_row_groups", "parquet"),
        ("several_files", "parquet"),
        ("uri_relative", "parquet"),
        ("hive", "parquet"),
        ("delta_vectors", "delta"),
        ("tar_several", "webdataset"),
    ] {
        let text = format!(
            "[pipeline]\nname = \"p\"\n[source]\ntable = \"{shape}\"\nformat = \"{format}\"\n[output]\ntable = \"out\"\n"
        );
        let pipeline = Pipeline::load_str(&text, "p.toml", folder.path()).unwrap();
        let source = runtime
            .block_on(Source::discover(&Stores::default(), &pipeline.source, 10, &Selection::default()))
            .unwrap();
        let read = |partition: &SourcePartition, units: &[WorkUnit], only: Option<&[String]>| -> Vec<String> {
            let only_ids = only.map(|ids| Arc::new(ids.iter().cloned().collect::<HashSet<_>>()));
            let options = ReadOptions { batch_rows: 7, max_image_bytes: 1 << 20 };
            let slices: Vec<Slice<'_>> =
                units.iter().map(|unit| Slice { partition, unit, only_ids: only_ids.clone() }).collect();
            let (mut ids, mut before, mut ends) = (Vec::new(), 0, Vec::new());
            let take = |slice, read| {
                assert_eq!(slice, ends.len(), "{shape}");
                match read {
                    Read::Rows(batch) => {
                        assert!(matches!(&batch.cells, Cells::Images(images) if images.iter().all(Result::is_ok)));
                        ids.extend(batch.ids.iter().flatten().map(str::to_owned));
                    }
                    Read::End { num_rows } => {
                        assert_eq!(num_rows, (ids.len() - before) as u64, "{shape}");
                        before = ids.len();
                        ends.push(num_rows);
                    }
                }
                true
            };
            runtime.block_on(source.read(&slices, &options, take)).unwrap();
            let known = units.iter().map(|unit| unit.num_rows);
            assert!(only.is_some() || known.zip(&ends).all(|(known, read)| known.is_none_or(|known| known == *read)));
            assert_eq!(ends.len(), units.len(), "{shape}");
            ids
        };
        let mut all = Vec::new();
        for partition in &source.partitions {
            let ids = read(partition, &partition.units, None);
            // Row groups of 3 rows; others have larger ones, which are never divided.
            if shape == "small_row_groups" || shape == "folder" {
                assert!(partition.units.len() >= 4 && partition.units.iter().all(|unit| unit.num_rows <= Some(10)));
            }
            // By file: the same rows in the same order.
            let by_file = partition
                .files
                .iter()
                .flat_map(|file| read(partition, &partition.units_of(&HashSet::from([file.name.clone()])), None));
            assert_eq!(by_file.collect::<Vec<_>>(), ids, "{shape}");
            // By id: the rows asked for, and no others.
            let some: Vec<String> = ids.iter().step_by(6).cloned().collect();
            let asked = [&some[..], &["no such id".to_owned()]].concat();
            assert_eq!(read(partition, &partition.units, Some(&asked)), some, "{shape}");
            all.extend(ids);
        }
        // Files of a Delta table have random names, which decide their order.
        assert!(all.is_sorted() || format == "delta", "{shape}");
        assert_eq!((all.len(), all.iter().collect::<HashSet<_>>().len()), (40, 40), "{shape}");
    }
}

#[test]
fn rows_of_a_unit_decide_how_many_files_there_are_and_nothing_else() {
    let folder = folder();
    python("source_shapes.py", &[&folder.path().join("pictures")]);
    let run = |name: &str, execution: &str| -> (Vec<String>, usize) {
        let text = format!(
            "[pipeline]\nname = \"p\"\n[source]\ntable = \"pictures/several_files\"\n[model]\npackage = \"model\"\n\
             [execution]\n{execution}\n[output]\ntable = \"out/{name}\"\n"
        );
        write(&folder.path().join(format!("{name}.toml")), &text);
        if name == "whole" {
            lookalike(folder.path(), &["fit", "whole.toml", "--latent-dim", "2", "--height", "8", "--width", "8"])
                .expect(0);
        }
        lookalike(folder.path(), &["run", &format!("{name}.toml")]).expect(0);
        // The run id too: it is the same run.
        (rows(&folder.path().join("out").join(name), TableName::Latents, &[]), live_files(folder.path(), name))
    };
    let (whole, one_file) = run("whole", "");
    let (in_units, three_files) = run("units", "unit_rows = 20");
    assert_eq!((one_file, three_files), (1, 3));
    assert_eq!(whole, in_units);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
fn a_struct_without_bytes_and_without_a_path_is_a_missing_image() {
    let folder = folder();
    let pictures = folder.path().join("pictures");
    python("source_shapes.py", &[&pictures]);
    lookalike(folder.path(), &["run", "--images", "pictures/folder", "--out", "folder"]).expect(0);
    let bytes: BinaryArray =
        [Some(picture(1)), None, None, None, None, Some(Vec::new())].iter().map(Option::as_deref).collect();
    let paths = ["nowhere.png", "pictures/folder/picture001.png", "", "gone.png", "unused", "unused"];
    let paths: StringArray = paths.into_iter().map(|path| (!path.is_empty()).then_some(path)).collect();
    let more = StringArray::from(vec!["x"; 6]);
    let fields: Vec<(FieldRef, ArrayRef)> = vec![
        (Arc::new(Field::new("path", DataType::Utf8, true)), Arc::new(paths)),
        (Arc::new(Field::new("source", DataType::Utf8, true)), Arc::new(more)),
        (Arc::new(Field::new("bytes", DataType::Binary, true)), Arc::new(bytes)),
    ];
    let (fields, arrays): (Vec<_>, Vec<_>) = fields.into_iter().unzip();
    let is_there = NullBuffer::from(vec![true, true, true, true, false, true]);
    let images = StructArray::new(fields.into(), arrays, Some(is_there));
    let ids = StringArray::from(vec!["bytes", "path", "neither", "gone", "null", "no_bytes"]);
    let rows =
        RecordBatch::try_from_iter([("image_id", Arc::new(ids) as ArrayRef), ("image", Arc::new(images))]).unwrap();
    let mut file = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut file, rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    std::fs::create_dir(folder.path().join("table")).unwrap();
    std::fs::write(folder.path().join("table/x.parquet"), file).unwrap();
    std::fs::rename(&pictures, folder.path().join("table/pictures")).unwrap();
    write(
        &folder.path().join("p.toml"),
        "[pipeline]\nname = \"p\"\n[source]\ntable = \"table/x.parquet\"\n[model]\npackage = \"folder/model\"\n[output]\ntable = \"out\"\n\
         [limits]\nmax_rejected_fraction = 1.0\n",
    );
    lookalike(folder.path(), &["run", "p.toml"]).expect(0);
    let found: Vec<_> =
        samples(&folder.path().join("out")).into_iter().map(|(_, id, status, _)| (id, status)).collect();
    let expected = [
        ("bytes", "ok"),
        ("path", "ok"),
        ("neither", "missing"),
        ("gone", "not_found"),
        ("null", "missing"),
        ("no_bytes", "empty"),
    ];
    assert_eq!(found, expected.map(|(id, status)| (id.to_owned(), status.to_owned())));
}
