//! Bytes of a file, fetched in blocks before they are asked for.
//!
//! A Parquet reader takes its columns page by page, and a row group may hold a whole table of pictures. So only blocks are in memory:
//! those that are being read, one for each column and a few more, and those that come next, which are under way while the ones before are
//! worked on. Both numbers are fixed, so a row group of ten gigabytes takes no more memory than one of ten megabytes, as long as its pages
//! are small; and a store that takes its time for every request is asked early enough.
//!
//! Blocks lie within the columns that are read, and follow each other as they are needed: row group after row group, and within one as its
//! columns are read side by side, wherever in the file each of them lies. Keys that come after a gigabyte of pictures are needed with the first of
//! these.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::path::Path;
use object_store::{DynObjectStore, GetOptions, GetResultPayload};
use parquet::errors::{ParquetError, Result};
use parquet::file::reader::{ChunkReader, Length};
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, spawn_blocking};

use super::buffers::Buffers;

/// Bytes of a block. At 100 MB/s it takes as long as a request to a store in the same region does before its first byte.
const BLOCK_BYTES: u64 = 4 << 20;

/// Blocks under way: 12 MiB, an eighth of a second at 100 MB/s.
const BLOCKS_AHEAD: usize = 3;

/// Their bytes, those of the files that come next among them.
const BYTES_AHEAD: u64 = BLOCKS_AHEAD as u64 * BLOCK_BYTES;

/// Columns that are no further apart than this are fetched together: less than what a store sends in the time of another request.
const GAP_BYTES: u64 = 1 << 20;

/// A file whose blocks are fetched ahead. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct ReadAhead(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    client: Arc<DynObjectStore>,
    path: Path,
    size_bytes: u64,
    /// Where the blocks lie, in the order in which they are needed.
    blocks: Vec<Range<u64>>,
    /// Their numbers in the order of the file.
    by_place: Vec<usize>,
    /// Blocks held beside those under way.
    kept: usize,
    buffers: Buffers,
    runtime: Handle,
    held: Mutex<Held>,
    /// The files that are read after this one.
    next_files: Mutex<Vec<ReadAhead>>,
    /// What the store answered, where it failed: readers of Arrow make text of the errors that they are given.
    fault: Mutex<Option<object_store::Error>>,
}

#[derive(Debug, Default)]
struct Held {
    blocks: BTreeMap<usize, Block>,
    /// The first block that was never asked for, for nothing is fetched ahead twice.
    next: usize,
    /// Counts the reads, to know which block was not read for the longest.
    reads: u64,
}

#[derive(Debug)]
enum Block {
    UnderWay(JoinHandle<object_store::Result<Bytes>>),
    Here { bytes: Bytes, last_read: u64 },
}

impl ReadAhead {
    /// Makes ready to read row groups, given as the places of their columns that will be read; of these, `num_columns` are read side by side.
    pub(super) fn new(
        client: Arc<DynObjectStore>,
        path: Path,
        size_bytes: u64,
        row_groups: &[Vec<Range<u64>>],
        num_columns: usize,
        buffers: Buffers,
        runtime: Handle,
    ) -> Self {
        let (blocks, by_place) = as_needed(&cut(row_groups.iter().flatten().cloned(), size_bytes), row_groups);
        // A page may begin in one block and end in the next.
        let kept = num_columns + 1;
        let (held, next_files, fault) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self(Arc::new(Inner {
            client,
            path,
            size_bytes,
            blocks,
            by_place,
            kept,
            buffers,
            runtime,
            held,
            next_files,
            fault,
        }))
    }

    /// Says which files are read after this one: their first blocks are fetched when few of its own are left, as far as there is room.
    pub(super) fn then(&self, files: impl IntoIterator<Item = Self>) {
        *self.0.next_files.lock().unwrap_or_else(PoisonError::into_inner) = files.into_iter().collect();
    }

    /// Asks for the first blocks of a file that will be read soon, of so many bytes at most. Returns how many bytes these have.
    fn start(&self, max_bytes: u64) -> u64 {
        let ends = self.0.blocks.iter().take(BLOCKS_AHEAD).scan(0, |end, block| {
            *end += block.end - block.start;
            Some(*end)
        });
        let ends: Vec<u64> = ends.take_while(|end| *end <= max_bytes).collect();
        self.0.fetch_ahead(&mut self.0.held.lock().unwrap_or_else(PoisonError::into_inner), ends.len());
        ends.last().copied().unwrap_or_default()
    }

    /// The store's answer for which reading failed, if it is to blame.
    pub(super) fn fault(&self) -> Option<object_store::Error> {
        self.0.fault.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The bytes of a range, however many blocks it takes.
    fn range(&self, range: Range<u64>) -> Result<Bytes> {
        let range = range.start..range.end.min(self.0.size_bytes);
        let wanted = length(&range);
        let first = if wanted > 0 { self.from(range.start)? } else { Bytes::new() };
        if first.len() >= wanted {
            return Ok(first.slice(..wanted));
        }
        let mut read = self.0.buffers.take(wanted);
        let (mut from_here, mut filled) = (first, 0);
        loop {
            let taken = &from_here[..from_here.len().min(wanted - filled)];
            read[filled..filled + taken.len()].copy_from_slice(taken);
            filled += taken.len();
            if filled == wanted {
                return Ok(read.freeze());
            }
            from_here = self.from(range.start + filled as u64)?;
        }
    }

    /// The bytes from a place on, up to the end of its block, of which there is at least one.
    fn from(&self, place: u64) -> Result<Bytes> {
        let inner = &*self.0;
        let behind = inner.by_place.partition_point(|number| inner.blocks[*number].end <= place);
        let block = inner.by_place.get(behind).map(|number| (*number, &inner.blocks[*number]));
        let (bytes, start) = if let Some((number, block)) = block.filter(|(_, block)| block.contains(&place)) {
            (inner.block(number)?, usize::try_from(place - block.start).unwrap_or(usize::MAX))
        } else {
            // What nobody said would be read.
            let next = block.map_or(inner.size_bytes, |(_, block)| block.start);
            let range = place..next.min(place + BLOCK_BYTES);
            let fetching = fetch(Arc::clone(&inner.client), inner.path.clone(), range, inner.buffers.clone());
            let fetched = inner.runtime.block_on(fetching);
            (fetched.map_err(|fault| inner.failed(fault))?, 0)
        };
        if start < bytes.len() { Ok(bytes.slice(start..)) } else { Err(too_short(&inner.path)) }
    }
}

impl Inner {
    /// Waits for a block, and asks for those after it.
    fn block(&self, number: usize) -> Result<Bytes> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let block = held.blocks.remove(&number).unwrap_or_else(|| self.fetch(number));
        held.next = held.next.max(number + 1);
        let end = self.blocks.len().min(number + 1 + BLOCKS_AHEAD);
        self.fetch_ahead(&mut held, end);
        let to_come = self.blocks[number + 1..end].iter().map(|block| block.end - block.start).sum();
        let mut room = BYTES_AHEAD.saturating_sub(to_come);
        for file in self.next_files.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            room -= file.start(room);
        }
        held.reads += 1;
        let now = held.reads;
        let bytes = match block {
            Block::Here { bytes, .. } => bytes,
            Block::UnderWay(fetching) => match self.runtime.block_on(fetching) {
                Ok(fetched) => fetched.map_err(|fault| self.failed(fault))?,
                Err(fault) => return Err(ParquetError::External(Box::new(fault))),
            },
        };
        held.blocks.insert(number, Block::Here { bytes: bytes.clone(), last_read: now });
        let here = held.blocks.iter().filter_map(|(number, block)| match block {
            Block::Here { last_read, .. } => Some((*last_read, *number)),
            Block::UnderWay(_) => None,
        });
        let mut here: Vec<(u64, usize)> = here.collect();
        here.sort_unstable();
        for (_, number) in here.iter().take(here.len().saturating_sub(self.kept)) {
            held.blocks.remove(number);
        }
        Ok(bytes)
    }

    /// Keeps the store's answer for [`ReadAhead::fault`].
    fn failed(&self, fault: object_store::Error) -> ParquetError {
        let told = ParquetError::General(fault.to_string());
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
        told
    }

    /// Asks for the blocks before `end`, of which there are as many.
    fn fetch_ahead(&self, held: &mut Held, end: usize) {
        for number in held.next..end {
            held.blocks.entry(number).or_insert_with(|| self.fetch(number));
            held.next = number + 1;
        }
    }

    fn fetch(&self, number: usize) -> Block {
        let (client, path, range) = (Arc::clone(&self.client), self.path.clone(), self.blocks[number].clone());
        Block::UnderWay(self.runtime.spawn(fetch(client, path, range, self.buffers.clone())))
    }
}

/// Bytes of a range that can be in memory.
fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX)
}

/// Fetches a range of a file; less of it where the file ends.
async fn fetch(
    client: Arc<DynObjectStore>,
    path: Path,
    range: Range<u64>,
    buffers: Buffers,
) -> object_store::Result<Bytes> {
    let found = client.get_opts(&path, GetOptions::new().with_range(Some(range))).await?;
    let mut buffer = buffers.take(length(&found.range));
    match found.payload {
        GetResultPayload::File(mut file, _) => {
            let fill = move || {
                file.seek(SeekFrom::Start(found.range.start))?;
                file.read_exact(&mut buffer).map(|()| buffer)
            };
            let failed = |fault| object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(fault) };
            Ok(spawn_blocking(fill).await?.map_err(failed)?.freeze())
        }
        GetResultPayload::Stream(mut parts) => {
            let mut filled = 0;
            while let Some(part) = parts.try_next().await? {
                let taken = part.len().min(buffer.len() - filled);
                buffer[filled..filled + taken].copy_from_slice(&part[..taken]);
                filled += taken;
            }
            buffer.truncate(filled);
            Ok(buffer.freeze())
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for block in self.held.get_mut().unwrap_or_else(PoisonError::into_inner).blocks.values() {
            if let Block::UnderWay(fetching) = block {
                fetching.abort();
            }
        }
    }
}

/// Puts blocks, which lie one behind the other, into the order in which reading row groups needs them. Returns them so, and the numbers that
/// they have then in the order of the file.
fn as_needed(blocks: &[Range<u64>], row_groups: &[Vec<Range<u64>>]) -> (Vec<Range<u64>>, Vec<usize>) {
    // Of each block the row group that needs it first, and when: in parts of the time that the row group takes.
    let mut needed = vec![(usize::MAX, 0); blocks.len()];
    for (row_group, columns) in row_groups.iter().enumerate() {
        for column in columns {
            let first = blocks.partition_point(|block| block.end <= column.start);
            for (block, needed) in blocks[first..].iter().zip(&mut needed[first..]) {
                if block.start >= column.end {
                    break;
                }
                let before = u128::from(block.start.saturating_sub(column.start));
                let when = (before << u32::BITS) / u128::from((column.end - column.start).max(1));
                *needed = (*needed).min((row_group, when));
            }
        }
    }
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_by_key(|place| needed[*place]);
    let mut by_place = vec![0; blocks.len()];
    for (number, place) in order.iter().enumerate() {
        by_place[*place] = number;
    }
    (order.into_iter().map(|place| blocks[place].clone()).collect(), by_place)
}

/// Cuts the places that will be read into blocks.
fn cut(chunks: impl IntoIterator<Item = Range<u64>>, size_bytes: u64) -> Vec<Range<u64>> {
    let mut chunks: Vec<Range<u64>> = chunks.into_iter().map(|chunk| chunk.start..chunk.end.min(size_bytes)).collect();
    chunks.retain(|chunk| !chunk.is_empty());
    chunks.sort_unstable_by_key(|chunk| chunk.start);
    let mut together: Vec<Range<u64>> = Vec::new();
    for chunk in chunks {
        match together.last_mut() {
            Some(last) if chunk.start <= last.end.saturating_add(GAP_BYTES) => last.end = last.end.max(chunk.end),
            _ => together.push(chunk),
        }
    }
    let blocks = |range: Range<u64>| {
        let starts = (range.start..range.end).step_by(usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX));
        starts.map(move |start| start..range.end.min(start + BLOCK_BYTES))
    };
    together.into_iter().flat_map(blocks).collect()
}

fn too_short(path: &Path) -> ParquetError {
    ParquetError::EOF(format!("{path} is shorter than its footer says"))
}

impl Length for ReadAhead {
    fn len(&self) -> u64 {
        self.0.size_bytes
    }
}

impl ChunkReader for ReadAhead {
    type T = Reader;

    fn get_read(&self, start: u64) -> Result<Reader> {
        // Whoever asks for a reader wants at least a byte, and what fails here fails with the store's own words.
        let rest = if start < self.len() { self.from(start)? } else { Bytes::new() };
        Ok(Reader { file: self.clone(), place: start, rest })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        let bytes = self.range(start..start.saturating_add(length as u64))?;
        if bytes.len() == length { Ok(bytes) } else { Err(too_short(&self.0.path)) }
    }
}

/// Reads on from a place of the file.
#[derive(Debug)]
pub(super) struct Reader {
    file: ReadAhead,
    place: u64,
    rest: Bytes,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() && self.place < self.file.len() {
            self.rest = self.file.from(self.place).map_err(io::Error::other)?;
        }
        let taken = self.rest.split_to(buffer.len().min(self.rest.len()));
        buffer[..taken.len()].copy_from_slice(&taken);
        self.place += taken.len() as u64;
        Ok(taken.len())
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of one range")]
mod tests {
    use object_store::ObjectStoreExt as _;
    use object_store::memory::InMemory;

    use super::*;

    /// A file of so many bytes, each with a value of its own place, and where the columns of its row group lie.
    fn file(runtime: &tokio::runtime::Runtime, size: u64, columns: &[Range<u64>], num_columns: usize) -> ReadAhead {
        let client: Arc<DynObjectStore> = Arc::new(InMemory::new());
        let path = Path::from("x.parquet");
        let bytes: Vec<u8> = (0..size).map(byte).collect();
        runtime.block_on(client.put(&path, bytes.into())).unwrap();
        ReadAhead::new(
            client,
            path,
            size,
            &[columns.to_vec()],
            num_columns,
            Buffers::default(),
            runtime.handle().clone(),
        )
    }

    fn byte(place: u64) -> u8 {
        (place.wrapping_mul(0x9E37_79B9) >> 13).to_le_bytes()[0]
    }

    fn expect(file: &ReadAhead, range: Range<u64>) {
        let length = usize::try_from(range.end - range.start).unwrap();
        let found = file.get_bytes(range.start, length).unwrap();
        assert!(found.iter().copied().eq(range.clone().map(byte)), "{range:?}");
        let mut read = vec![0; length];
        file.get_read(range.start).unwrap().read_exact(&mut read).unwrap();
        assert!(read == found, "{range:?}");
    }

    #[test]
    fn blocks_lie_within_the_columns_and_small_gaps_are_fetched_too() {
        let (far, block) = (GAP_BYTES + 1, BLOCK_BYTES);
        assert_eq!(cut([20..30, 0..10], 100), [0..30]);
        assert_eq!(cut([0..10, 10 + far..20 + far], u64::MAX), [0..10, 10 + far..20 + far]);
        assert_eq!(
            cut([5..5 + 2 * block + 1], u64::MAX),
            [5..5 + block, 5 + block..5 + 2 * block, 5 + 2 * block..6 + 2 * block]
        );
        // A footer may say more than there is.
        assert_eq!(cut([0..50, 90..900], 100), [0..100]);
        assert!(cut([7..7], 100).is_empty());
    }

    #[test]
    fn blocks_are_in_the_order_of_need_wherever_the_columns_lie() {
        let block = BLOCK_BYTES;
        // Two row groups, each with three blocks of pictures and after these keys of less than a block, and of two.
        let groups = |keys: u64| {
            let group = |start: u64| vec![start..start + 3 * block, start + 3 * block..start + 3 * block + keys];
            [group(0), group(3 * block + keys)]
        };
        let numbers =
            |groups: &[Vec<Range<u64>>]| as_needed(&cut(groups.iter().flatten().cloned(), u64::MAX), groups).1;
        // Keys share a block with the first pictures of the next row group, and the last ones with the end of their own pictures.
        assert_eq!(numbers(&groups(10)), [0, 2, 3, 1, 5, 6, 4]);
        assert_eq!(numbers(&groups(2 * block)), [0, 2, 4, 1, 3, 5, 7, 9, 6, 8]);
        // As the file has them where keys come first.
        assert_eq!(numbers(&[vec![0..10, 10..10 + 3 * block]]), [0, 1, 2, 3]);
    }

    #[test]
    fn keys_behind_the_pictures_leave_these_to_be_fetched_ahead() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let pictures = 0..9 * BLOCK_BYTES;
        let keys = pictures.end..pictures.end + 1000;
        let file = file(&runtime, keys.end, &[pictures, keys.clone()], 2);
        for page in 0..9 {
            expect(&file, keys.start + page..keys.start + page + 1);
            expect(&file, page * BLOCK_BYTES..page * BLOCK_BYTES + 1);
            let held = file.0.held.lock().unwrap();
            // The block of keys is second of all, and those of pictures after it are asked for one after the other.
            let last = file.0.blocks.len().min(usize::try_from(page).unwrap() + 2 + BLOCKS_AHEAD);
            assert_eq!(held.next, last, "at page {page}: {held:?}");
            assert!(held.blocks.len() <= 3 + BLOCKS_AHEAD, "{held:?}");
        }
    }

    #[test]
    fn every_range_is_read_whatever_blocks_it_takes_and_few_are_held() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let size = 12 * BLOCK_BYTES + 5;
        let file = file(&runtime, size, &[0..size], 2);
        assert_eq!(file.start(2 * BLOCK_BYTES + 1), 2 * BLOCK_BYTES);
        // A small column at the beginning, and a large one that is read beside it.
        for page in 0..11 {
            let start = 100 + page * BLOCK_BYTES;
            expect(&file, start..start + BLOCK_BYTES + 77);
            expect(&file, page..page + 9);
            let held = file.0.held.lock().unwrap();
            let here = held.blocks.values().filter(|block| matches!(block, Block::Here { .. })).count();
            assert!(here <= 3 && held.blocks.len() <= 3 + BLOCKS_AHEAD, "{held:?}");
        }
        expect(&file, size - 3..size);
        assert!(file.get_bytes(size - 3, 4).is_err(), "there are three bytes");
        assert!(file.get_bytes(size, 1).is_err());
    }

    #[test]
    fn the_next_files_are_begun_when_there_is_room() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let of_blocks = |count: u64| file(&runtime, count * BLOCK_BYTES, &[0..count * BLOCK_BYTES], 1);
        let (first, second, third) = (of_blocks(5), of_blocks(2), of_blocks(9));
        first.then([second.clone(), third.clone()]);
        for (block, begun) in [(0, (0, 0)), (1, (0, 0)), (2, (1, 0)), (3, (2, 0)), (4, (2, 1))] {
            expect(&first, block * BLOCK_BYTES..block * BLOCK_BYTES + 1);
            let next = |file: &ReadAhead| file.0.held.lock().unwrap().next;
            assert_eq!((next(&second), next(&third)), begun, "at block {block}");
        }
    }

    #[test]
    fn what_nobody_said_would_be_read_is_read_all_the_same() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let size = 4 * BLOCK_BYTES;
        let file = file(&runtime, size, &[0..10, 3 * BLOCK_BYTES..3 * BLOCK_BYTES + 10], 1);
        expect(&file, 5..20);
        expect(&file, BLOCK_BYTES..BLOCK_BYTES + 9);
        expect(&file, 3 * BLOCK_BYTES - 4..3 * BLOCK_BYTES + 4);
    }

    #[test]
    fn a_store_that_fails_is_told_in_its_own_words() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let client: Arc<DynObjectStore> = Arc::new(InMemory::new());
        let gone = ReadAhead::new(
            client,
            Path::from("gone"),
            10,
            &[vec![0..10]],
            1,
            Buffers::default(),
            runtime.handle().clone(),
        );
        assert!(gone.get_bytes(0, 4).is_err());
        assert!(matches!(gone.fault(), Some(object_store::Error::NotFound { .. })));
        assert!(gone.get_read(0).is_err());
        assert!(matches!(gone.fault(), Some(object_store::Error::NotFound { .. })));
        assert!(gone.fault().is_none());
    }
}
