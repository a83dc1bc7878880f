//! What each fuzz target does with its bytes: what the program does with them, and what must hold of the result.
//!
//! The targets in `fuzz_targets` call these functions, and so do the tests of the program, with the files in `seeds`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{
    ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use lookalike::config::Pipeline;
use lookalike::decode::{Color, DecodeLimits, Filter, Fit, PixelSpec, decode};
use lookalike::model::onnx_proto::{self, ModelProto};
use lookalike::model::{Contract, MAX_INPUT_VALUES, ModelError};
use lookalike::source::predicate::Predicate;
use lookalike::table::Receipt;
use prost::Message as _;

/// The cell of an image column.
pub(crate) fn image(data: &[u8]) {
    // Small, so that many images are tried; slow is what takes long for its size.
    let limits = DecodeLimits { max_image_bytes: 1 << 20, max_pixels: 1 << 20, max_decode: Duration::from_secs(20) };
    let base = PixelSpec {
        height: 5,
        width: 7,
        color: Color::Rgb,
        filter: Filter::Bilinear,
        fit: Fit::Stretch,
        resize: None,
        exif_rotation: true,
    };
    let spec = match data.len() % 3 {
        0 => base,
        1 => PixelSpec { color: Color::Gray, filter: Filter::Lanczos, fit: Fit::Crop, ..base },
        _ => PixelSpec { filter: Filter::Area, fit: Fit::Pad, ..base },
    };
    match decode(data, &spec, &limits) {
        Ok(pixels) => {
            assert_eq!(pixels.data.len(), spec.num_samples());
            assert!(u64::from(pixels.source_width) * u64::from(pixels.source_height) <= limits.max_pixels);
        }
        Err(reject) => {
            assert_ne!(reject.code(), "decode_timeout");
            assert!(!reject.to_string().contains(char::is_control));
        }
    }
}

/// A pipeline file.
pub(crate) fn pipeline_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Pipeline::load_str(text, "pipeline.toml", Path::new("/jobs")) {
        Ok(pipeline) => {
            let settings = pipeline.settings_json().to_string();
            let again =
                Pipeline::load_str(text, "pipeline.toml", Path::new("/jobs")).map(|again| again.settings_json());
            assert_eq!(again.map(|again| again.to_string()).as_ref().ok(), Some(&settings));
        }
        Err(error) => {
            assert!(!error.problems().is_empty());
            // As it is shown to people, with the lines marked.
            let _ = format!("{error} {:?}", miette::Report::new(error.clone()));
        }
    }
}

/// A receipt.
pub(crate) fn receipt(data: &[u8]) {
    if let Ok(receipt) = Receipt::parse(data) {
        let text = serde_json::to_vec(&receipt).unwrap_or_default();
        assert_eq!(Receipt::parse(&text).ok(), Some(receipt));
    }
}

/// A `model.toml`.
pub(crate) fn model_toml(data: &[u8]) {
    match Contract::parse("models/", data) {
        Ok(contract) => {
            assert!((1..=MAX_INPUT_VALUES).contains(&contract.input.num_values()));
            if let Some(image) = contract.input.image() {
                assert_eq!(image.pixels.num_samples(), contract.input.num_values());
            }
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let _ = (error.to_string(), error.hint(), cause);
            assert!(!matches!(error, ModelError::Store(_) | ModelError::Runtime(_)));
        }
    }
}

/// An ONNX file, as far as it is read before ONNX Runtime has it.
pub(crate) fn onnx_proto(data: &[u8]) {
    if let Ok(model) = ModelProto::decode(bytes::Bytes::copy_from_slice(data)) {
        let _ = (onnx_proto::check(&model), onnx_proto::opset(&model), onnx_proto::external_data_locations(&model));
    }
}

/// The `where` of a source table.
pub(crate) fn predicate(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(predicate) = Predicate::parse(text) else { return };
    let columns: [(&str, ArrayRef); 5] = [
        ("a", Arc::new(Int64Array::from(vec![Some(i64::MIN), Some(0), None, Some(i64::MAX)]))),
        ("b", Arc::new(StringArray::from(vec![Some("cat"), Some(""), None, Some("2026-11-22")]))),
        ("c", Arc::new(Float64Array::from(vec![Some(f64::NAN), Some(-0.0), None, Some(f64::INFINITY)]))),
        ("d", Arc::new(BooleanArray::from(vec![Some(true), Some(false), None, Some(true)]))),
        ("t", Arc::new(TimestampMicrosecondArray::from(vec![Some(i64::MIN), Some(0), None, Some(i64::MAX)]))),
    ];
    let Ok(rows) = RecordBatch::try_from_iter_with_nullable(columns.map(|(name, column)| (name, column, true))) else {
        return;
    };
    if predicate.check(&rows.schema()).is_ok()
        && let Ok(kept) = predicate.evaluate(&rows)
    {
        assert_eq!(kept.len(), rows.num_rows());
    }
}
