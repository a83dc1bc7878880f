//! The two directions in which vectors differ the most: principal components by orthogonal iteration (Golub and Van Loan, Matrix
//! Computations, 4th edition, sections 8.2.4 and 8.5), which needs products with the vectors alone and no matrix of their dimension squared.

use faer::Mat;
use ndarray::{Array1, Array2, Axis};

use crate::model::ppca;

/// Directions that are followed beside the two that are asked for: with them the plane converges by the ratio of the second to the
/// seventh eigenvalue, not to the third.
const GUARD: usize = 4;

/// Rounds. A picture of points is the same long before the components are exact.
const ROUNDS: usize = 40;

/// Where vectors lie in the plane of their first two principal components.
#[derive(Debug)]
pub(super) struct Plane {
    /// Two coordinates a vector.
    pub(super) points: Vec<[f64; 2]>,
    /// Share of the variance along either of them.
    pub(super) explained: [f64; 2],
}

/// Projects rows of `dim` values each; `None` for fewer than three, and where all are the same. Each direction points to where its
/// largest element is positive, so the same vectors give the same picture.
pub(super) fn project(mut rows: Array2<f32>) -> Option<Plane> {
    let (num_rows, dim) = rows.dim();
    if num_rows < 3 || dim == 0 {
        return None;
    }
    rows -= &rows.mean_axis(Axis(0))?;
    let total: f64 = rows.iter().map(|value| f64::from(*value).powi(2)).sum();
    if total <= 0.0 || !total.is_finite() {
        return None;
    }
    let count = (2 + GUARD).min(dim);
    // Any start does that is not orthogonal to what is sought; cosines of different pace are not.
    let start = |(row, column): (usize, usize)| (((row + 1) * (column + 1)) as f32).cos();
    let mut directions = orthonormal(Array2::from_shape_fn((dim, count), start));
    for _ in 0..ROUNDS {
        directions = orthonormal(rows.t().dot(&rows.dot(&directions)));
    }
    let directions = turned(&rows, directions);
    let coordinates = rows.dot(&directions);
    let axis = |column: usize| -> (Array1<f64>, f64) {
        if column >= count {
            // Vectors of one value lie on a line.
            return (Array1::zeros(num_rows), 0.0);
        }
        let strength: f64 = coordinates.column(column).iter().map(|value| f64::from(*value).powi(2)).sum();
        let largest = directions.column(column).iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()));
        let sign = largest.map_or(1.0, |value| f64::from(value.signum()));
        (coordinates.column(column).mapv(|value| f64::from(value) * sign), strength / total)
    };
    let ((x, of_x), (y, of_y)) = (axis(0), axis(1));
    let points = x.into_iter().zip(y).map(|(x, y)| [x, y]).collect();
    Some(Plane { points, explained: [of_x, of_y] })
}

/// Directions of the same space along which the vectors do not vary together, the strongest first; as they are where that cannot be found.
fn turned(rows: &Array2<f32>, directions: Array2<f32>) -> Array2<f32> {
    let coordinates = rows.dot(&directions).mapv(f64::from);
    let products = coordinates.t().dot(&coordinates);
    let count = products.nrows();
    let matrix = Mat::from_fn(count, count, |row, column| products[[row, column]]);
    let Ok(pairs) = ppca::dense_eigenpairs(matrix.as_ref(), count) else { return directions };
    #[expect(clippy::cast_possible_truncation, reason = "directions are of 32 bits, as the vectors are")]
    let turn = Array2::from_shape_fn((count, count), |(row, column)| pairs.vectors[(row, column)] as f32);
    directions.dot(&turn)
}

/// Share of a direction below which what is left of it, without the others, is rounding.
const ROUNDING: f32 = 1e-4;

/// The columns made orthonormal, one after the other (Gram-Schmidt, done twice, which is enough); what is nothing but the others becomes
/// zero.
fn orthonormal(mut columns: Array2<f32>) -> Array2<f32> {
    for number in 0..columns.ncols() {
        let mut column = columns.column(number).to_owned();
        let length = column.dot(&column).sqrt();
        for earlier in (0..number).chain(0..number) {
            let earlier = columns.column(earlier);
            let along = earlier.dot(&column);
            column.scaled_add(-along, &earlier);
        }
        let rest = column.dot(&column).sqrt();
        let factor = if rest > length * ROUNDING { 1.0 / rest } else { 0.0 };
        columns.column_mut(number).assign(&(column * factor));
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ppca::MomentAccumulator;

    /// Vectors of 20 values, which differ by 9, 4, 2, 1 and 0.5 along five directions.
    fn vectors() -> Array2<f32> {
        let mut random = fastrand::Rng::with_seed(7);
        let directions = orthonormal(Array2::from_shape_fn((20, 5), |_| random.f32() - 0.5));
        let spread = Array2::from_diag(&Array1::from(vec![9.0, 4.0, 2.0, 1.0, 0.5]));
        let latents = Array2::from_shape_fn((300, 5), |_| random.f32() - 0.5);
        latents.dot(&spread).dot(&directions.t()) + 3.0
    }

    #[test]
    fn the_plane_is_that_of_the_closed_form() {
        let rows = vectors();
        let mut moments = MomentAccumulator::new(20).unwrap();
        moments.push(rows.as_slice().unwrap()).unwrap();
        let expected = ppca::fit(moments, 2).unwrap();
        let plane = project(rows).unwrap();
        for (axis, variance) in expected.explained_variance.iter().take(2).enumerate() {
            let found = plane.points.iter().map(|point| point[axis].powi(2)).sum::<f64>() / 300.0;
            // One divides by the number of rows, the other by one less.
            assert!((found / variance - 1.0).abs() < 0.01, "{found} is not {variance}");
            assert!((plane.explained[axis] - variance / expected.total_variance).abs() < 0.001);
        }
        let product: f64 = plane.points.iter().map(|[x, y]| x * y).sum();
        assert!(product.abs() < 1e-2, "{product}");
    }

    #[test]
    fn directions_of_almost_equal_strength_are_told_apart() {
        // Along the axes 1.01, 1 and 0.99, which forty rounds alone do not part.
        let rows = Array2::from_shape_fn((6, 3), |(row, axis)| {
            let strength = [1.01, 1.0, 0.99][axis];
            if row / 2 == axis { strength * [1.0, -1.0][row % 2] } else { 0.0 }
        });
        let plane = project(rows).unwrap();
        for (point, expected) in
            plane.points.iter().zip([[1.01, 0.0], [-1.01, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
        {
            assert!(
                (point[0] - expected[0]).abs() < 1e-3 && (point[1] - expected[1]).abs() < 1e-3,
                "{point:?} is not {expected:?}"
            );
        }
    }

    #[test]
    fn what_has_no_plane_has_no_map() {
        assert!(project(Array2::zeros((2, 4))).is_none());
        assert!(project(Array2::ones((10, 4))).is_none());
        assert!(project(Array2::zeros((10, 0))).is_none());
        let line = project(Array2::from_shape_fn((10, 1), |(row, _)| row as f32)).unwrap();
        assert!(line.points.iter().all(|[_, y]| y.to_bits() == 0), "{line:?}");
        assert!((line.explained[0] - 1.0).abs() < 1e-6 && line.explained[1].to_bits() == 0, "{line:?}");
    }
}
