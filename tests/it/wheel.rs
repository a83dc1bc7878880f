use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::support::{folder, needed, python};

const CHECKOUT: &str = env!("CARGO_MANIFEST_DIR");

/// Wheels are packed in the checkout, one at a time.
static PACKING: Mutex<()> = Mutex::new(());

/// Runs a script that packs the program that is tested here.
fn packed(script: &str) {
    let _one = PACKING.lock().unwrap_or_else(PoisonError::into_inner);
    let target_dir = Path::new(env!("CARGO_BIN_EXE_lookalike")).ancestors().nth(2).unwrap();
    let (wheelhouse, folder) = (needed("LOOKALIKE_TEST_WHEELHOUSE"), folder());
    python(script, &[Path::new(CHECKOUT), target_dir, &wheelhouse, folder.path()]);
}

#[test]
fn the_wheel_installs_into_an_empty_environment_works_with_nothing_else_set_and_leaves_nothing() {
    packed("wheel_installs.py");
}

#[test]
fn the_steps_of_the_dockerfile_make_an_image_that_works() {
    packed("docker_steps.py");
}
