//! The images of a batch, decoded one after the other.
//!
//! Nothing is allocated for an image once the buffers have grown to the size of the images: the decoder keeps its working memory from batch
//! to batch, and the pixels lie in buffers that are used again.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{DecodeLimits, DecodeMode, Decoder, PixelSpec, Reject, Size};

/// The pixels of a batch, for each of the specs that were asked for.
#[derive(Debug, Default)]
pub struct DecodedBatch {
    /// The size of each image of the batch, or why there are no pixels of it.
    rows: Vec<Result<Size, Reject>>,
    /// For each spec, the samples of those that have pixels, one image after the other.
    samples: Vec<Vec<u8>>,
}

/// The pixels of one image of a batch.
#[derive(Debug, Clone, Copy)]
pub struct DecodedImage<'a> {
    /// The size that it had.
    pub size: Size,
    batch: &'a DecodedBatch,
    /// Its number among the images with pixels, and how many these are.
    place: (usize, usize),
}

impl<'a> DecodedImage<'a> {
    /// The samples for one of the specs, in height, width, channel order.
    pub fn samples(&self, spec: usize) -> &'a [u8] {
        let all = &self.batch.samples[spec];
        let (place, count) = self.place;
        let each = all.len() / count;
        &all[place * each..(place + 1) * each]
    }
}

impl DecodedBatch {
    /// The images in their order.
    pub fn images(&self) -> impl Iterator<Item = Result<DecodedImage<'_>, &Reject>> {
        let count = self.num_decoded();
        let mut next = 0;
        self.rows.iter().map(move |row| {
            row.as_ref().map(|size| {
                next += 1;
                DecodedImage { size: *size, batch: self, place: (next - 1, count) }
            })
        })
    }

    /// Images that have pixels.
    pub fn num_decoded(&self) -> usize {
        self.rows.iter().filter(|row| row.is_ok()).count()
    }
}

/// Decodes batches to pixels of the same specs.
#[derive(Debug)]
pub struct BatchDecoder {
    specs: Arc<[PixelSpec]>,
    mode: DecodeMode,
    limits: DecodeLimits,
    decoder: Decoder,
    batch: DecodedBatch,
}

impl BatchDecoder {
    /// A decoder for images of these specs.
    pub fn new(specs: Arc<[PixelSpec]>, mode: DecodeMode, limits: DecodeLimits) -> Self {
        Self { specs, mode, limits, decoder: Decoder::default(), batch: DecodedBatch::default() }
    }

    /// Decodes images, each once, and counts in `done` those that it is done with. What is rejected already stays so, and those of the
    /// numbers `late` are taken for images that take too long.
    pub fn decode<Bytes: Deref<Target = [u8]>>(
        &mut self,
        images: &[Result<Bytes, Reject>],
        late: &[usize],
        done: &AtomicUsize,
    ) {
        let Self { specs, mode, limits, decoder, batch } = self;
        batch.rows.clear();
        batch.samples.resize_with(specs.len(), Vec::new);
        batch.samples.iter_mut().for_each(Vec::clear);
        for (number, image) in images.iter().enumerate() {
            let decoded = match image {
                Err(reject) => Err(reject.clone()),
                Ok(_) if late.contains(&number) => Err(Reject::TimedOut { limit: limits.max_decode }),
                Ok(bytes) => decoder.decode(bytes, specs, *mode, limits, &mut batch.samples),
            };
            batch.rows.push(decoded);
            done.store(number + 1, Ordering::Relaxed);
        }
    }

    /// The images that were decoded last.
    pub fn decoded(&self) -> &DecodedBatch {
        &self.batch
    }
}
