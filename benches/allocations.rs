//! Allocations for an image, once the buffers have grown: `cargo bench --bench allocations`.
//!
//! Images go through the steps of a worker one by one, in one thread, and each step's allocations are counted. What a format's decoder
//! allocates is that decoder's; the steps after it are ours, and must not allocate at all.

use std::process::ExitCode;

use allocation_counter::{AllocationInfo, measure};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder as _};
use lookalike::decode::{Color, DecodeLimits, DecodeMode, Decoder, Filter, Fit, Layout, Normalizer, PixelSpec};
use lookalike::hash;
use lookalike::pixel_stats::PixelStats;
use lookalike::score::{Tensors, score};

/// Images after which all buffers have their size.
const WARM_UP: usize = 4;

/// Images that are counted.
const IMAGES: usize = 100;

/// Side of the images as they are stored.
const SIDE: u32 = 512;

/// Side of the model's input.
const INPUT_SIDE: u32 = 224;

#[expect(clippy::print_stdout, reason = "the figures are what it is for")]
fn main() -> ExitCode {
    let samples: Vec<u8> = (0..SIDE * SIDE * 3).map(|place| (place / 7 * 31 + place % 251).to_le_bytes()[0]).collect();
    let (mut jpeg, mut png) = (Vec::new(), Vec::new());
    let encoders = [
        JpegEncoder::new_with_quality(&mut jpeg, 90).write_image(&samples, SIDE, SIDE, ExtendedColorType::Rgb8),
        PngEncoder::new(&mut png).write_image(&samples, SIDE, SIDE, ExtendedColorType::Rgb8),
    ];
    for written in encoders {
        written.expect("pictures of ours can be encoded");
    }
    println!("allocations for each of {IMAGES} images of {SIDE} x {SIDE}, to {INPUT_SIDE} x {INPUT_SIDE}");
    let mut is_free = true;
    for (name, bytes) in [("JPEG", &jpeg), ("PNG", &png)] {
        is_free &= count(name, bytes);
    }
    if is_free { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Counts the allocations of each step, and says whether those that are ours have none.
#[expect(clippy::print_stdout, reason = "the figures are what it is for")]
fn count(name: &str, bytes: &[u8]) -> bool {
    let spec = PixelSpec {
        height: INPUT_SIDE,
        width: INPUT_SIDE,
        color: Color::Rgb,
        filter: Filter::Bicubic,
        fit: Fit::Crop,
        resize: None,
        exif_rotation: true,
    };
    let limits = DecodeLimits::default();
    let normalizer = Normalizer::new(Color::Rgb, 1.0 / 255.0, &[0.5; 3], &[0.5; 3]).expect("a normalization");
    let (mut decoder, mut samples, mut tensor, mut squared) =
        (Decoder::default(), [Vec::new()], Vec::new(), Vec::new());
    let mut steps = [AllocationInfo::default(); 4];
    for image in 0..WARM_UP + IMAGES {
        samples[0].clear();
        tensor.clear();
        let each = [
            measure(|| {
                let specs = std::slice::from_ref(&spec);
                decoder.decode(bytes, specs, DecodeMode::Exact, &limits, &mut samples).expect("an image of ours");
            }),
            measure(|| {
                std::hint::black_box(hash::digest(bytes));
                std::hint::black_box(PixelStats::of(&samples[0], INPUT_SIDE as usize, &[1.0; 3]));
            }),
            measure(|| normalizer.push_tensor(&samples[0], Layout::Nchw, &mut tensor)),
            measure(|| {
                let tensors = Tensors { input: &tensor, reconstruction: Some(&tensor), ..Tensors::default() };
                std::hint::black_box(score(tensors, None, &mut squared));
            }),
        ];
        if image >= WARM_UP {
            for (sum, step) in steps.iter_mut().zip(each) {
                sum.count_total += step.count_total;
                sum.bytes_total += step.bytes_total;
            }
        }
    }
    let names = ["decode and resize", "hash and statistics", "normalize", "score"];
    for (step, info) in names.iter().zip(steps) {
        let (count, bytes) = (info.count_total as f64 / IMAGES as f64, info.bytes_total / IMAGES as u64);
        println!("  {name}  {step:20} {count:6.1}, of {bytes} bytes");
    }
    steps[1..].iter().all(|step| step.count_total == 0)
}
