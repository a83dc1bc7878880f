//! Near-duplicate groups: which images stand for the same picture, and which of them represents it.
//!
//! Star clustering (the leader algorithm of Hartigan 1975) on the pairs that are near enough, walked in an order that the images
//! themselves decide: larger resolution first, then more bytes, then the smaller id, then the earlier partition. An image that is not
//! taken yet becomes a representative and takes all of its neighbors that are not taken yet. So:
//!
//! - every image is in exactly one group, and no member is farther from its representative than the threshold: a chain of images, each
//!   near the next, does not pull its ends together;
//! - the groups do not depend on the order of images or pairs.
//!
//! Images of the same bytes count as one before anything else: they are in one group, however few neighbors a list had room for.
//!
//! This file knows nothing of tables. It holds the id and a few dozen bytes for each image, and twelve for each pair within the threshold.

use std::cmp::Reverse;

use crate::neighbors::exact::JoinError;

/// Bytes of a content hash that are kept: 128 bits, by which no two of any number of images meet by chance.
const CONTENT_BYTES: usize = 16;

/// What decides which image of a group represents it, and which images are the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    /// Width times height of the source image.
    pub pixels: u64,
    /// Bytes of the encoded image.
    pub bytes: u64,
    /// The beginning of the hash of these bytes; `None` where it is not known, and then the image is the same as no other.
    pub content: Option<[u8; CONTENT_BYTES]>,
}

impl Facts {
    /// The facts of an image; `content_sha256` in hexadecimal digits.
    pub fn new(pixels: u64, bytes: u64, content_sha256: Option<&str>) -> Self {
        Self { pixels, bytes, content: content_sha256.and_then(leading_bytes) }
    }
}

/// The first bytes of a hash that is written in hexadecimal digits.
fn leading_bytes(digits: &str) -> Option<[u8; CONTENT_BYTES]> {
    let mut bytes = [0; CONTENT_BYTES];
    for (place, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * place..2 * place + 2)?, 16).ok()?;
    }
    Some(bytes)
}

/// An image, with its id in a text that all share.
#[derive(Debug)]
struct Image {
    id_start: usize,
    id_end: usize,
    partition: u32,
    facts: Facts,
}

/// Images that are to be grouped, in any order.
#[derive(Debug, Default)]
pub struct Images {
    ids: String,
    images: Vec<Image>,
}

impl Images {
    /// Adds an image. Ids are unique within a partition.
    pub fn push(&mut self, id: &str, partition: u32, facts: Facts) {
        let id_start = self.ids.len();
        self.ids.push_str(id);
        self.images.push(Image { id_start, id_end: self.ids.len(), partition, facts });
    }

    fn name(&self, image: &Image) -> (&str, u32) {
        (&self.ids[image.id_start..image.id_end], image.partition)
    }
}

/// A pair within the threshold.
#[derive(Debug, Clone, Copy)]
struct Pair {
    from: u32,
    to: u32,
    distance: f32,
}

/// What an image is in its group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Member {
    /// Number of the representative; the image's own if it is one.
    pub representative: u32,
    /// Distance to the representative; 0 for itself and for images of the same bytes.
    pub distance: f32,
    /// Images in the group, this one included.
    pub group_size: u32,
}

/// Images with the pairs of them that are near enough. An image's number is its place in the order of ids, then partitions.
#[derive(Debug)]
pub struct Grouping {
    images: Images,
    pairs: Vec<Pair>,
    max_distance: f64,
}

impl Grouping {
    /// Numbers the images. Pairs up to `max_distance` make groups.
    ///
    /// # Errors
    /// [`JoinError::TooManyRows`] for 2³² images and more.
    pub fn new(mut images: Images, max_distance: f64) -> Result<Self, JoinError> {
        let num_rows = images.images.len();
        if u32::try_from(num_rows).is_err() {
            return Err(JoinError::TooManyRows { num_rows });
        }
        let mut sorted = std::mem::take(&mut images.images);
        sorted.sort_unstable_by(|a, b| images.name(a).cmp(&images.name(b)));
        images.images = sorted;
        Ok(Self { images, pairs: Vec::new(), max_distance })
    }

    /// How many images there are.
    pub fn num_images(&self) -> usize {
        self.images.images.len()
    }

    /// Id and partition of an image.
    pub fn name(&self, image: u32) -> (&str, u32) {
        self.images.name(&self.images.images[image as usize])
    }

    /// The number of an image, if it is one of these.
    pub fn find(&self, id: &str, partition: u32) -> Option<u32> {
        let images = &self.images;
        let place = images.images.binary_search_by(|image| images.name(image).cmp(&(id, partition)));
        place.ok().and_then(|place| u32::try_from(place).ok())
    }

    /// Whether a distance makes two images one picture.
    pub fn is_near(&self, distance: f32) -> bool {
        f64::from(distance) <= self.max_distance
    }

    /// Takes note of a pair, if it is near enough; from either side, or from both.
    pub fn connect(&mut self, from: u32, to: u32, distance: f32) {
        if self.is_near(distance) {
            self.pairs.push(Pair { from, to, distance });
        }
    }

    /// Which image represents which, by number.
    pub fn members(&self) -> Vec<Member> {
        let heads = self.heads();
        let pairs = self.pairs_of_heads(&heads);
        let mut order: Vec<u32> = numbers(heads.len()).filter(|image| heads[*image as usize] == *image).collect();
        order.sort_unstable_by_key(|head| self.preference(*head));
        let mut taken: Vec<Option<(u32, f32)>> = vec![None; heads.len()];
        for head in order {
            if taken[head as usize].is_some() {
                continue;
            }
            taken[head as usize] = Some((head, 0.0));
            let start = pairs.partition_point(|pair| pair.from < head);
            for pair in pairs[start..].iter().take_while(|pair| pair.from == head) {
                taken[pair.to as usize].get_or_insert((head, pair.distance));
            }
        }
        let of = |image: u32| taken[heads[image as usize] as usize].unwrap_or((image, 0.0));
        let mut sizes = vec![0_u32; heads.len()];
        numbers(heads.len()).for_each(|image| sizes[of(image).0 as usize] += 1);
        numbers(heads.len())
            .map(|image| {
                let (representative, distance) = of(image);
                Member { representative, distance, group_size: sizes[representative as usize] }
            })
            .collect()
    }

    /// The order in which images become representatives.
    fn preference(&self, image: u32) -> (Reverse<u64>, Reverse<u64>, u32) {
        let facts = &self.images.images[image as usize].facts;
        (Reverse(facts.pixels), Reverse(facts.bytes), image)
    }

    /// For each image the most preferred of those that have the same bytes.
    fn heads(&self) -> Vec<u32> {
        let content = |image: u32| self.images.images[image as usize].facts.content;
        let mut heads: Vec<u32> = numbers(self.num_images()).collect();
        let mut by_content: Vec<u32> = heads.iter().copied().filter(|image| content(*image).is_some()).collect();
        by_content.sort_unstable_by_key(|image| (content(*image), self.preference(*image)));
        for same in by_content.chunk_by(|a, b| content(*a) == content(*b)) {
            for image in same {
                heads[*image as usize] = same[0];
            }
        }
        heads
    }

    /// The pairs as pairs of heads, seen from both sides, each once with its smallest distance, in order.
    fn pairs_of_heads(&self, heads: &[u32]) -> Vec<Pair> {
        let mut pairs = Vec::with_capacity(2 * self.pairs.len());
        for pair in &self.pairs {
            let (from, to) = (heads[pair.from as usize], heads[pair.to as usize]);
            if from != to {
                pairs.extend([Pair { from, to, ..*pair }, Pair { from: to, to: from, ..*pair }]);
            }
        }
        pairs.sort_unstable_by(|a, b| (a.from, a.to).cmp(&(b.from, b.to)).then(a.distance.total_cmp(&b.distance)));
        pairs.dedup_by_key(|pair| (pair.from, pair.to));
        pairs
    }
}

/// The numbers of so many images, which [`Grouping::new`] has seen to fit.
fn numbers(num_images: usize) -> impl Iterator<Item = u32> {
    (0..u32::MAX).take(num_images)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    const MAX_DISTANCE: f64 = 0.5;

    /// Id and partition.
    type Name = (String, u32);

    /// Representative, distance to it, and size of the group of each image.
    type Found = BTreeMap<Name, (Name, f32, u32)>;

    fn groups(rows: &[(Name, Facts)], pairs: &[(Name, Name, f32)]) -> Found {
        let mut images = Images::default();
        for ((id, partition), facts) in rows {
            images.push(id, *partition, *facts);
        }
        let mut grouping = Grouping::new(images, MAX_DISTANCE).unwrap();
        for (from, to, distance) in pairs {
            let [from, to] = [from, to].map(|(id, partition)| grouping.find(id, *partition).unwrap());
            grouping.connect(from, to, *distance);
        }
        let name = |image: u32| (grouping.name(image).0.to_owned(), grouping.name(image).1);
        let members = numbers(grouping.num_images()).zip(grouping.members());
        let found = members
            .map(|(image, member)| (name(image), (name(member.representative), member.distance, member.group_size)));
        found.collect()
    }

    /// The same for images of different ids, each with pixels, bytes and a letter for its content.
    fn by_id(
        rows: &[(&str, u64, u64, Option<&str>)],
        pairs: &[(&str, &str, f32)],
    ) -> BTreeMap<String, (String, f32, u32)> {
        let name = |id: &str| (id.to_owned(), 0);
        let digits = |content: &str| crate::hash::sha256(content.as_bytes());
        let rows: Vec<_> = rows
            .iter()
            .map(|(id, pixels, bytes, content)| (name(id), Facts::new(*pixels, *bytes, content.map(digits).as_deref())))
            .collect();
        let pairs: Vec<_> = pairs.iter().map(|(from, to, distance)| (name(from), name(to), *distance)).collect();
        let found = groups(&rows, &pairs).into_iter();
        found.map(|((id, _), ((head, _), distance, size))| (id, (head, distance, size))).collect()
    }

    fn member(representative: &str, distance: f32, size: u32) -> (String, f32, u32) {
        (representative.to_owned(), distance, size)
    }

    #[test]
    fn the_representative_has_the_most_pixels_then_the_most_bytes_then_the_smallest_id() {
        let heads = |sizes: [(u64, u64); 3]| {
            let rows: Vec<_> =
                ["c", "b", "a"].into_iter().zip(sizes).map(|(id, size)| (id, size.0, size.1, None)).collect();
            let found = by_id(&rows, &[("a", "b", 0.1), ("c", "a", 0.1), ("b", "c", 0.1)]);
            found
                .into_values()
                .map(|(head, ..)| head)
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(heads([(10, 9), (11, 1), (10, 9)]), "b");
        assert_eq!(heads([(10, 3), (10, 2), (10, 1)]), "c");
        assert_eq!(heads([(10, 1), (10, 1), (10, 1)]), "a");
    }

    #[test]
    fn the_ends_of_a_chain_are_not_in_one_group_beyond_the_threshold() {
        // a - b - c, where a and c are farther from each other than the threshold.
        let pairs = [("a", "b", 0.4), ("b", "c", 0.4), ("a", "c", 0.8)];
        // The first end takes the middle, and the other end is left alone.
        let found = by_id(&[("a", 3, 1, None), ("b", 2, 1, None), ("c", 1, 1, None)], &pairs);
        assert_eq!(found["a"], member("a", 0.0, 2));
        assert_eq!(found["b"], member("a", 0.4, 2));
        assert_eq!(found["c"], member("c", 0.0, 1));
        // The middle may take both ends: each is within the threshold of it.
        let found = by_id(&[("a", 1, 1, None), ("b", 3, 1, None), ("c", 2, 1, None)], &pairs);
        assert_eq!((&found["a"], &found["c"]), (&member("b", 0.4, 3), &member("b", 0.4, 3)));
    }

    #[test]
    fn images_of_the_same_bytes_are_one_whether_or_not_they_are_in_each_others_lists() {
        let rows = [("a", 5, 1, Some("x")), ("b", 5, 1, Some("x")), ("c", 5, 1, Some("y")), ("d", 9, 1, None)];
        let found = by_id(&rows, &[]);
        assert_eq!((&found["a"], &found["b"]), (&member("a", 0.0, 2), &member("a", 0.0, 2)));
        assert_eq!((&found["c"], &found["d"]), (&member("c", 0.0, 1), &member("d", 0.0, 1)));
        // What is near one of them is near all of them, and they are as far as the nearest.
        let found = by_id(&rows, &[("d", "b", 0.5), ("a", "d", 0.25)]);
        for id in ["a", "b"] {
            assert_eq!(found[id], member("d", 0.25, 3));
        }
    }

    #[test]
    fn one_id_in_two_partitions_is_two_images() {
        let name = |partition| ("a".to_owned(), partition);
        let rows = [(name(2), Facts::default()), (name(1), Facts::default())];
        let found = groups(&rows, &[(name(2), name(1), 0.5)]);
        assert_eq!(found[&name(1)], (name(1), 0.0, 2));
        assert_eq!(found[&name(2)], (name(1), 0.5, 2));
    }

    #[test]
    fn no_images_make_no_groups() {
        let grouping = Grouping::new(Images::default(), MAX_DISTANCE).unwrap();
        assert!(grouping.members().is_empty());
        assert_eq!(grouping.find("a", 0), None);
    }

    #[test]
    fn a_hash_that_is_none_is_nobody_elses() {
        for digits in ["", "abc", "ä0000000000000000000000000000000", &"z".repeat(64)] {
            assert_eq!(Facts::new(1, 1, Some(digits)).content, None, "{digits}");
        }
        assert_eq!(Facts::new(1, 1, Some(&"0f".repeat(32))).content, Some([15; CONTENT_BYTES]));
    }

    #[test]
    fn groups_of_random_images_keep_their_promises_in_whichever_order_these_come() {
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..300 {
            let count = rng.u32(1..40);
            let mut rows: Vec<(Name, Facts)> = (0..count)
                .map(|image| {
                    let content = rng.bool().then(|| [rng.u8(0..12); CONTENT_BYTES]);
                    let facts = Facts { pixels: rng.u64(1..4), bytes: rng.u64(1..4), content };
                    (((image / 2).to_string(), image % 2), facts)
                })
                .collect();
            let any = |rng: &mut fastrand::Rng| rows[rng.usize(..rows.len())].0.clone();
            let mut pairs: Vec<_> =
                (0..rng.u32(0..4 * count)).map(|_| (any(&mut rng), any(&mut rng), rng.f32())).collect();
            pairs.retain(|(from, to, _)| from != to);
            let found = groups(&rows, &pairs);
            rng.shuffle(&mut rows);
            rng.shuffle(&mut pairs);
            for pair in &mut pairs {
                if rng.bool() {
                    std::mem::swap(&mut pair.0, &mut pair.1);
                }
            }
            assert_eq!(groups(&rows, &pairs), found);
            check(&rows, &pairs, &found);
        }
    }

    #[track_caller]
    fn check(rows: &[(Name, Facts)], pairs: &[(Name, Name, f32)], found: &Found) {
        let content: BTreeMap<&Name, _> = rows.iter().map(|(name, facts)| (name, facts.content)).collect();
        let same = |a: &Name, b: &Name| a == b || (content[a].is_some() && content[a] == content[b]);
        let mut sizes: BTreeMap<&Name, u32> = BTreeMap::new();
        for (head, ..) in found.values() {
            *sizes.entry(head).or_default() += 1;
        }
        assert_eq!(found.len(), rows.len(), "every image is in one group");
        for (image, (head, distance, size)) in found {
            assert_eq!((&found[head].0, sizes[head]), (head, *size), "the group of {head:?}");
            // There is a pair that tells the distance, and none that tells a smaller one.
            let told = pairs
                .iter()
                .filter(|(from, to, _)| (same(from, image) && same(to, head)) || (same(from, head) && same(to, image)));
            let nearest = told.map(|pair| pair.2).fold(f32::INFINITY, f32::min);
            let expected = if same(image, head) { 0.0 } else { nearest };
            assert_eq!(expected.to_bits(), distance.to_bits(), "{image:?}");
            assert!(f64::from(*distance) <= MAX_DISTANCE, "{image:?}");
        }
        // Of two representatives that are near each other, one would have been taken by the other.
        for (from, to, distance) in pairs {
            let are_heads = [from, to].iter().all(|image| found[*image].0 == **image);
            assert!(!are_heads || f64::from(*distance) > MAX_DISTANCE, "{from:?} {to:?} {distance}");
        }
    }
}
