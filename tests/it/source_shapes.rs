use std::collections::BTreeMap;

use lookalike::schema::TableName;

use crate::support::{folder, lookalike, python, rows, write};

#[test]
fn the_same_images_give_the_same_latents_in_every_shape() {
    let folder = folder();
    let pictures = folder.path().join("pictures");
    python("source_shapes.py", &[&pictures]);
    lookalike(folder.path(), &["run", "--images", "pictures/folder", "--out", "folder"]).expect(0);
    let latents = |out: &str| -> BTreeMap<String, String> {
        // Ids differ in form between the shapes; the content hash does not.
        rows(&folder.path().join(out), TableName::Latents, &["run_id", "image_id", "status", "error_message"])
            .into_iter()
            .map(|row| {
                let row = row.split_once(' ').unwrap().1.to_owned();
                let hash = row.split("content_sha256=").nth(1).unwrap().split(' ').next().unwrap().to_owned();
                (hash, row)
            })
            .collect()
    };
    let expected = latents("folder");
    assert!(expected.len() > 20);
    let shapes: Vec<_> = std::fs::read_dir(&pictures)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "folder" && !name.ends_with(".json"))
        .collect();
    assert!(shapes.len() >= 8, "{shapes:?}");
    for shape in shapes {
        let id = if shape.contains("int64") { "number" } else { "image_id" };
        write(
            &folder.path().join(format!("{shape}.toml")),
            &format!(
                "[pipeline]\nname = \"shape\"\n[source]\ntable = \"pictures/{shape}\"\nid = \"{id}\"\n[model]\npackage = \"folder/model\"\n\
                 [output]\ntable = \"out/{shape}\"\n"
            ),
        );
        lookalike(folder.path(), &["run", &format!("{shape}.toml")]).expect(0);
        assert_eq!(latents(&format!("out/{shape}")), expected, "{shape}");
    }
}
