//! How near a picture is to another one: PSNR and SSIM of 8-bit pixels. Pure functions of two pictures of one size.

/// The largest value of a sample.
const PEAK: f64 = 255.0;

/// Longest side of the window of [`ssim`], in pixels: that of Wang et al.
const WINDOW: usize = 11;

/// Standard deviation of the window of [`ssim`], in pixels.
const WINDOW_SIGMA: f64 = 1.5;

/// Steadies the comparison of means, as a share of [`PEAK`].
const K1: f64 = 0.01;

/// Steadies the comparison of variances, as a share of [`PEAK`].
const K2: f64 = 0.03;

/// Peak signal-to-noise ratio of samples, in decibels: `10 log10(255² / MSE)`, the mean taken over pixels and channels. `None`
/// where there is no noise: the pictures are equal, or empty.
pub fn psnr(a: &[u8], b: &[u8]) -> Option<f64> {
    let squared: u64 = a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum();
    (squared > 0).then(|| 10.0 * (PEAK * PEAK * a.len() as f64 / squared as f64).log10())
}

/// Structural similarity, -1 to 1, which equal pictures have: Z. Wang, A. C. Bovik, H. R. Sheikh and E. P. Simoncelli, "Image
/// Quality Assessment: From Error Visibility to Structural Similarity", IEEE Transactions on Image Processing 13(4), 2004,
/// equation 13,
///
/// ```text
/// SSIM = (2 μa μb + C1) (2 σab + C2) / ((μa² + μb² + C1) (σa² + σb² + C2))     C1 = (0.01 · 255)², C2 = (0.03 · 255)²
/// ```
///
/// with the weighted moments of their window, a Gaussian of 11 x 11 pixels with a standard deviation of 1.5, averaged over all
/// places where the window lies within the picture, and over channels. Along a side shorter than 11 pixels, the window has the
/// largest odd length that fits.
///
/// Samples lie in height, width, channel order; pictures without any are equal.
pub fn ssim(a: &[u8], b: &[u8], width: usize, channels: usize) -> f64 {
    let (c1, c2) = ((K1 * PEAK).powi(2), (K2 * PEAK).powi(2));
    let height = a.len() / (width * channels).max(1);
    if height == 0 {
        return 1.0;
    }
    let (across, down) = (window(width), window(height));
    let mut sum = 0.0;
    let mut count = 0_usize;
    for channel in 0..channels {
        let plane = |samples: &[u8]| -> Vec<f64> {
            samples.iter().skip(channel).step_by(channels).map(|sample| f64::from(*sample)).collect()
        };
        let (a, b) = (plane(a), plane(b));
        let mean = |a: &[f64], b: Option<&[f64]>| {
            let product: Vec<f64> = match b {
                Some(b) => a.iter().zip(b).map(|(a, b)| a * b).collect(),
                None => a.to_vec(),
            };
            filter(&product, width, &across, &down)
        };
        let (mean_a, mean_b) = (mean(&a, None), mean(&b, None));
        let (square_a, square_b, product) = (mean(&a, Some(&a)), mean(&b, Some(&b)), mean(&a, Some(&b)));
        for place in 0..mean_a.len() {
            let (mu_a, mu_b) = (mean_a[place], mean_b[place]);
            let variances = square_a[place] - mu_a * mu_a + (square_b[place] - mu_b * mu_b);
            let covariance = product[place] - mu_a * mu_b;
            sum += (2.0 * mu_a * mu_b + c1) * (2.0 * covariance + c2)
                / ((mu_a * mu_a + mu_b * mu_b + c1) * (variances + c2));
        }
        count += mean_a.len();
    }
    sum / count as f64
}

/// The weights of the window along a side of so many pixels; they add up to one.
fn window(side: usize) -> Vec<f64> {
    let length = WINDOW.min(side.saturating_sub((side + 1) % 2)).max(1);
    let middle = (length / 2) as f64;
    let weights: Vec<f64> =
        (0..length).map(|place| (-((place as f64 - middle) / WINDOW_SIGMA).powi(2) / 2.0).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// Weighted means over windows, wherever the window lies within the plane: first across, then down.
fn filter(plane: &[f64], width: usize, across: &[f64], down: &[f64]) -> Vec<f64> {
    let weigh = |values: &mut dyn Iterator<Item = f64>, weights: &[f64]| -> f64 {
        weights.iter().zip(values).map(|(weight, value)| weight * value).sum()
    };
    let narrow = width + 1 - across.len();
    let rows: Vec<f64> = plane
        .chunks_exact(width)
        .flat_map(|row| row.windows(across.len()).map(|values| weigh(&mut values.iter().copied(), across)))
        .collect();
    let height = rows.len() / narrow;
    (0..(height + 1).saturating_sub(down.len()) * narrow)
        .map(|place| weigh(&mut rows[place..].iter().copied().step_by(narrow), down))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(len: u32, factor: u32) -> Vec<u8> {
        (0..len).map(|i| (i * i * factor + i * 57).to_le_bytes()[0]).collect()
    }

    #[test]
    fn a_difference_of_one_level_everywhere_is_48_decibels() {
        // 20 log10(255) = 48.1308.
        let found = psnr(&[10, 20, 30], &[11, 19, 31]).unwrap();
        assert!((found - 48.130_803_608_679_1).abs() < 1e-10, "{found}");
        assert_eq!(psnr(&[10, 20], &[10, 20]), None);
        assert!(psnr(&[0; 12], &[255; 12]).unwrap().abs() < 1e-12);
    }

    #[test]
    fn equal_pictures_have_similarity_one_and_opposite_ones_a_negative_one() {
        let picture = pattern(20 * 15 * 3, 31);
        assert!((ssim(&picture, &picture, 20, 3) - 1.0).abs() < 1e-12);
        let opposite: Vec<u8> = picture.iter().map(|sample| 255 - sample).collect();
        assert!(ssim(&picture, &opposite, 20, 3) < -0.5);
    }

    #[test]
    fn flat_pictures_differ_by_their_means_alone() {
        // (2 · 100 · 120 + C1) / (100² + 120² + C1), C1 = 6.5025.
        let expected = 24_006.502_5 / 24_406.502_5;
        let found = ssim(&[100; 16 * 16], &[120; 16 * 16], 16, 1);
        assert!((found - expected).abs() < 1e-9, "{found}");
    }

    #[test]
    fn a_picture_of_one_window_has_the_moments_of_its_weights() {
        let (a, b) = (pattern(121, 31), pattern(121, 7));
        let weights = window(11);
        let moment = |value: &dyn Fn(usize) -> f64| -> f64 {
            (0..121).map(|place| weights[place % 11] * weights[place / 11] * value(place)).sum()
        };
        let (a_at, b_at) = (|place: usize| f64::from(a[place]), |place: usize| f64::from(b[place]));
        let (mu_a, mu_b) = (moment(&a_at), moment(&b_at));
        let variance_a = moment(&|place| (a_at(place) - mu_a).powi(2));
        let variance_b = moment(&|place| (b_at(place) - mu_b).powi(2));
        let covariance = moment(&|place| (a_at(place) - mu_a) * (b_at(place) - mu_b));
        let expected = (2.0 * mu_a * mu_b + 6.502_5) * (2.0 * covariance + 58.522_5)
            / ((mu_a * mu_a + mu_b * mu_b + 6.502_5) * (variance_a + variance_b + 58.522_5));
        let found = ssim(&a, &b, 11, 1);
        assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
    }

    #[test]
    fn the_window_shrinks_to_the_largest_odd_length_that_fits() {
        for (side, length) in [(1, 1), (2, 1), (3, 3), (8, 7), (10, 9), (11, 11), (12, 11), (64, 11)] {
            let weights = window(side);
            assert_eq!(weights.len(), length, "{side}");
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
        let picture = pattern(8 * 4, 31);
        let other = pattern(8 * 4, 30);
        let found = ssim(&picture, &other, 8, 1);
        assert!(found > -1.0 && found < 1.0, "{found}");
    }
}
