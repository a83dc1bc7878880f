//! The two directions in which vectors differ the most: principal components by orthogonal iteration (Golub and Van Loan, Matrix
//! Computations, 4th edition, section 8.2.4), which needs products with the vectors alone and no matrix of their dimension squared.

use ndarray::{Array1, Array2, Axis};

/// Directions that are followed beside the two that are asked for: with them the iteration converges by the ratio of the second to the
/// fifth eigenvalue, not to the third.
const GUARD: usize = 2;

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
    let coordinates = rows.dot(&directions);
    let strength = |column: usize| coordinates.column(column).iter().map(|value| f64::from(*value).powi(2)).sum();
    let mut order: Vec<(usize, f64)> = (0..count).map(|column| (column, strength(column))).collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let axis = |number: usize| -> (Array1<f64>, f64) {
        // Vectors of one value lie on a line.
        let Some((column, strength)) = order.get(number).copied() else { return (Array1::zeros(num_rows), 0.0) };
        let largest = directions.column(column).iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()));
        let sign = largest.map_or(1.0, |value| f64::from(value.signum()));
        (coordinates.column(column).mapv(|value| f64::from(value) * sign), strength / total)
    };
    let ((x, of_x), (y, of_y)) = (axis(0), axis(1));
    let points = x.into_iter().zip(y).map(|(x, y)| [x, y]).collect();
    Some(Plane { points, explained: [of_x, of_y] })
}

/// The columns made orthonormal, one after the other (modified Gram-Schmidt); what is nothing but the others becomes zero.
fn orthonormal(mut columns: Array2<f32>) -> Array2<f32> {
    for number in 0..columns.ncols() {
        let mut column = columns.column(number).to_owned();
        let length = column.dot(&column).sqrt();
        for earlier in 0..number {
            let earlier = columns.column(earlier);
            let along = earlier.dot(&column);
            column.scaled_add(-along, &earlier);
        }
        let rest = column.dot(&column).sqrt();
        let factor = if rest > length * f32::EPSILON { 1.0 / rest } else { 0.0 };
        columns.column_mut(number).assign(&(column * factor));
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ppca::{self, MomentAccumulator};

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
    fn what_has_no_plane_has_no_map() {
        assert!(project(Array2::zeros((2, 4))).is_none());
        assert!(project(Array2::ones((10, 4))).is_none());
        assert!(project(Array2::zeros((10, 0))).is_none());
        let line = project(Array2::from_shape_fn((10, 1), |(row, _)| row as f32)).unwrap();
        assert!(line.points.iter().all(|[_, y]| *y == 0.0) && line.explained == [1.0, 0.0]);
    }
}
