//! `[input]` of a contract: what the network is given for a row of the source.
//!
//! There are two kinds. An *image* is decoded, brought to the tensor's pixels, and normalized channel by channel. *Features* are numbers
//! already, a vector or a tensor of any number of axes; nothing is decoded, and they are normalized value by value. A contract that does not
//! say its `kind` is of an image.

use serde::{Deserialize, Serialize};

use super::ModelError;
use crate::decode::{self, Color, DecodeLimits, Filter, Fit, Layout, NormalizeError, Normalizer, PixelSpec, Reject};
use crate::features::{FeatureNormalizer, Tensor, fits, shape_text};
use crate::source::{Content, Source};

/// From a row of the source to the input tensor: `(value * scale - mean) / std`, where values are pixels or features.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "WrittenInput", into = "WrittenInput")]
pub struct Input {
    /// Name of the network's input.
    pub tensor: String,
    /// What the values are.
    pub kind: InputKind,
    /// Factor on the values; pixels are 0 to 255.
    pub scale: f32,
    /// Subtracted after the factor: of an image one a channel, of features one, or one a value.
    pub mean: Vec<f32>,
    /// Divided by after that, as many.
    pub std: Vec<f32>,
}

/// What the values of an input tensor are.
#[derive(Debug, Clone, PartialEq)]
pub enum InputKind {
    /// Pixels.
    Image(ImageInput),
    /// Numbers of a list column.
    Features {
        /// Lengths of the tensor's axes, without that of the batch.
        shape: Vec<usize>,
    },
}

/// How an image becomes the pixels of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageInput {
    /// The pixels.
    pub pixels: PixelSpec,
    /// Order of the axes.
    pub layout: Layout,
}

impl Input {
    /// The pixels to ask the decoder for, where the model takes images.
    pub fn image(&self) -> Option<&ImageInput> {
        match &self.kind {
            InputKind::Image(image) => Some(image),
            InputKind::Features { .. } => None,
        }
    }

    /// Lengths of the axes of one row's tensor.
    pub fn shape(&self) -> Vec<usize> {
        match &self.kind {
            InputKind::Image(ImageInput { pixels, layout }) => {
                let (channels, height, width) =
                    (pixels.color.channels(), pixels.height as usize, pixels.width as usize);
                match layout {
                    Layout::Nchw => vec![channels, height, width],
                    Layout::Nhwc => vec![height, width, channels],
                }
            }
            InputKind::Features { shape } => shape.clone(),
        }
    }

    /// Values of one row's tensor, up to [`super::MAX_INPUT_VALUES`].
    pub fn num_values(&self) -> usize {
        self.shape().into_iter().fold(1, usize::saturating_mul)
    }

    /// Whether the tensor has the values as they are.
    #[expect(clippy::float_cmp, reason = "these numbers as they were written, and no others, change nothing")]
    pub fn is_identity(&self) -> bool {
        self.scale == 1.0 && self.mean.iter().all(|mean| *mean == 0.0) && self.std.iter().all(|std| *std == 1.0)
    }

    /// What makes the tensors.
    pub fn preparation(&self) -> Result<Preparation, NormalizeError> {
        let Self { scale, mean, std, .. } = self;
        Ok(match &self.kind {
            InputKind::Image(ImageInput { pixels, layout }) => Preparation::Image(ImagePreparation {
                pixels: pixels.clone(),
                layout: *layout,
                normalizer: Normalizer::new(pixels.color, *scale, mean, std)?,
                units_per_level: std.iter().map(|std| f64::from(*scale) / f64::from(*std)).collect(),
            }),
            InputKind::Features { shape } => Preparation::Features(FeatureNormalizer::new(shape, *scale, mean, std)?),
        })
    }

    /// Fails where the rows of a source are no input of the model, as far as the type of their column tells it. `package` is the model's.
    pub fn check(&self, package: &str, source: &Source) -> Result<(), ModelError> {
        let fits = match (&self.kind, source.content()) {
            // No partition is selected, and nothing will be read.
            (_, None) | (InputKind::Image(_), Some(Content::Images)) => true,
            (InputKind::Features { shape }, Some(Content::Features(lengths))) => fits(shape, lengths),
            (InputKind::Image(_), Some(Content::Features(_))) | (InputKind::Features { .. }, Some(Content::Images)) => {
                false
            }
        };
        let holds = source.content().filter(|_| !fits).map(ToString::to_string);
        holds.map_or(Ok(()), |holds| {
            Err(ModelError::OtherInput {
                package: package.to_owned(),
                takes: self.describe(),
                table: source.url().to_string(),
                holds,
            })
        })
    }

    /// What the model takes, in words.
    fn describe(&self) -> String {
        match &self.kind {
            InputKind::Image(_) => "images".to_owned(),
            InputKind::Features { shape } => format!("features of {} values", shape_text(shape)),
        }
    }
}

/// What makes input tensors of what the source holds.
#[derive(Debug)]
pub enum Preparation {
    /// Of decoded images.
    Image(ImagePreparation),
    /// Of feature vectors and tensors.
    Features(FeatureNormalizer),
}

impl Preparation {
    /// Appends the input tensor of a row's content as golden rows hold it: a compressed image, or the numbers as little-endian `f32`.
    pub fn push_content(&self, content: &[u8], tensors: &mut Vec<f32>) -> Result<(), Reject> {
        match self {
            Self::Image(preparation) => decode::decode(content, &preparation.pixels, &DecodeLimits::default())
                .map(|pixels| preparation.push_tensor(&pixels.data, tensors)),
            Self::Features(normalizer) => normalizer.push_tensor(&Tensor::flat(content.into()), tensors),
        }
    }
}

/// What makes input tensors of decoded images, and pixels of tensors.
#[derive(Debug, Clone)]
pub struct ImagePreparation {
    /// The pixels to ask the decoder for.
    pub pixels: PixelSpec,
    /// Order of the tensor's axes.
    pub layout: Layout,
    /// By how much a value of the tensor differs for one level of 255, for each channel.
    pub units_per_level: Vec<f64>,
    normalizer: Normalizer,
}

impl ImagePreparation {
    /// Appends the input tensor of samples, which must be those of [`ImagePreparation::pixels`].
    pub fn push_tensor(&self, samples: &[u8], tensors: &mut Vec<f32>) {
        self.normalizer.push_tensor(samples, self.layout, tensors);
    }

    /// Turns a tensor of the input's units into pixels, rounded and clamped to 8 bits: the inverse of [`ImagePreparation::push_tensor`].
    pub fn to_pixels(&self, tensor: &[f32]) -> Vec<u8> {
        let mut samples = vec![0; tensor.len()];
        self.normalizer.write_samples(tensor, self.layout, &mut samples);
        samples
    }
}

/// `[input]` as it is written: the keys of both kinds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenInput {
    tensor: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<WrittenKind>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shape: Option<Vec<u32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    height: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    width: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    color: Option<Color>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layout: Option<Layout>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    filter: Option<Filter>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fit: Option<Fit>,
    /// With `fit = "crop"`, the length of the shorter side before the cut: 256 for what was trained with `Resize(256)` and
    /// `CenterCrop(224)`. Without it, the smallest that covers the tensor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resize: Option<u32>,
    scale: f32,
    mean: Vec<f32>,
    std: Vec<f32>,
    /// Whether images are turned as their EXIF orientation says; they are unless this says no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exif_rotation: Option<bool>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum WrittenKind {
    Image,
    Features,
}

impl TryFrom<WrittenInput> for Input {
    type Error = String;

    fn try_from(written: WrittenInput) -> Result<Self, String> {
        let WrittenInput { tensor, scale, mean, std, .. } = written;
        let kind = match written.kind.unwrap_or(WrittenKind::Image) {
            WrittenKind::Image => {
                if written.shape.is_some() {
                    return Err("`shape` is for kind = \"features\"; an image has `height` and `width`".to_owned());
                }
                let missing = |key: &str| format!("missing field `{key}`");
                InputKind::Image(ImageInput {
                    pixels: PixelSpec {
                        height: written.height.ok_or_else(|| missing("height"))?,
                        width: written.width.ok_or_else(|| missing("width"))?,
                        color: written.color.ok_or_else(|| missing("color"))?,
                        filter: written.filter.ok_or_else(|| missing("filter"))?,
                        fit: written.fit.ok_or_else(|| missing("fit"))?,
                        resize: written.resize,
                        exif_rotation: written.exif_rotation.unwrap_or(true),
                    },
                    layout: written.layout.ok_or_else(|| missing("layout"))?,
                })
            }
            WrittenKind::Features => {
                let of_image = [
                    ("height", written.height.is_some()),
                    ("width", written.width.is_some()),
                    ("color", written.color.is_some()),
                    ("layout", written.layout.is_some()),
                    ("filter", written.filter.is_some()),
                    ("fit", written.fit.is_some()),
                    ("resize", written.resize.is_some()),
                    ("exif_rotation", written.exif_rotation.is_some()),
                ];
                if let Some((key, _)) = of_image.into_iter().find(|(_, is_there)| *is_there) {
                    return Err(format!("`{key}` is for images, and the kind is \"features\""));
                }
                let shape = written.shape.ok_or("missing field `shape`")?;
                InputKind::Features { shape: shape.into_iter().map(|len| len as usize).collect() }
            }
        };
        Ok(Self { tensor, kind, scale, mean, std })
    }
}

impl From<Input> for WrittenInput {
    fn from(input: Input) -> Self {
        let Input { tensor, kind, scale, mean, std } = input;
        let mut written = Self {
            tensor,
            kind: None,
            shape: None,
            height: None,
            width: None,
            color: None,
            layout: None,
            filter: None,
            fit: None,
            resize: None,
            scale,
            mean,
            std,
            exif_rotation: None,
        };
        match kind {
            InputKind::Image(ImageInput { pixels, layout }) => {
                (written.height, written.width) = (Some(pixels.height), Some(pixels.width));
                (written.color, written.layout) = (Some(pixels.color), Some(layout));
                (written.filter, written.fit) = (Some(pixels.filter), Some(pixels.fit));
                written.resize = pixels.resize;
                written.exif_rotation = Some(pixels.exif_rotation);
            }
            InputKind::Features { shape } => {
                written.kind = Some(WrittenKind::Features);
                written.shape = Some(shape.iter().map(|len| u32::try_from(*len).unwrap_or(u32::MAX)).collect());
            }
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: &str = "tensor = \"image\"\nheight = 4\nwidth = 6\ncolor = \"rgb\"\nlayout = \"nchw\"\nfilter = \"area\"\n\
                         fit = \"crop\"\nscale = 0.5\nmean = [0.0, 1.0, 2.0]\nstd = [1.0, 2.0, 4.0]\n";
    const FEATURES: &str =
        "tensor = \"x\"\nkind = \"features\"\nshape = [128, 40]\nscale = 1.0\nmean = [0.5]\nstd = [2.0]\n";

    fn read(text: &str) -> Result<Input, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| error.to_string())
    }

    #[test]
    fn an_input_without_a_kind_is_an_image_and_is_written_without_one() {
        let input = read(IMAGE).unwrap();
        assert_eq!((input.shape(), input.num_values()), (vec![3, 4, 6], 72));
        assert!(input.image().unwrap().pixels.exif_rotation);
        assert_eq!(toml::to_string(&input).unwrap(), format!("{IMAGE}exif_rotation = true\n"));
        assert_eq!(read(&format!("kind = \"image\"\n{IMAGE}")).unwrap(), input);
    }

    #[test]
    fn features_have_a_shape_and_survive_writing_and_reading() {
        let input = read(FEATURES).unwrap();
        assert_eq!((input.shape(), input.num_values()), (vec![128, 40], 5120));
        assert_eq!(input.image(), None);
        assert_eq!(toml::to_string(&input).unwrap(), FEATURES);
    }

    #[test]
    fn keys_of_the_other_kind_are_refused_by_name() {
        for (text, expected) in [
            (format!("{IMAGE}shape = [3]\n"), "`shape` is for kind"),
            (format!("{FEATURES}height = 4\n"), "`height` is for images"),
            (format!("{FEATURES}exif_rotation = false\n"), "`exif_rotation` is for images"),
            (IMAGE.replace("width = 6\n", ""), "missing field `width`"),
            (FEATURES.replace("shape = [128, 40]\n", ""), "missing field `shape`"),
            (FEATURES.replace("features", "sounds"), "sounds"),
            (FEATURES.replace("40", "-40"), "-40"),
            (format!("{FEATURES}colour = \"gray\"\n"), "colour"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
