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
//!
//! A page is needed in one piece. Writers of pictures like to put a hundred of them into a row group and its only page, so a column of a row
//! group is one block as long as it is not too large: its pages are parts of the memory into which the store's answer was written, and so are
//! the pictures within them.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::TryStreamExt as _;
use futures::future::try_join_all;
use object_store::path::Path;
use object_store::{DynObjectStore, GetOptions, GetResultPayload};
use parquet::errors::{ParquetError, Result};
use parquet::file::reader::{ChunkReader, Length};
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, spawn_blocking};

use super::buffers::Buffers;

/// Bytes of a block. At 100 MB/s it takes as long as a request to a store in the same region does before its first byte.
const BLOCK_BYTES: u64 = BLOCK_LEN as u64;

/// The same, of memory.
const BLOCK_LEN: usize = 4 << 20;

/// Bytes of a column of a row group up to which it is not cut. It is fetched by several requests then.
pub(super) const WHOLE_BYTES: usize = 16 << 20;

/// Bytes under way, those of the files that come next among them: an eighth of a second at 100 MB/s. A single block may have more.
const BYTES_AHEAD: u64 = 3 * BLOCK_BYTES;

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
    /// Where the columns of the row groups lie, in the order of the file.
    columns: Vec<Range<u64>>,
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
    /// Up to where each of the columns was read: they are read from their beginnings to their ends.
    read_to: Vec<u64>,
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
        let mut columns: Vec<Range<u64>> = row_groups.iter().flatten().cloned().collect();
        columns.sort_unstable_by_key(|column| column.start);
        let (blocks, by_place) = as_needed(&cut(&columns, size_bytes), row_groups);
        // A page may begin in one block and end in the next.
        let kept = num_columns + 1;
        let held = Held { read_to: columns.iter().map(|column| column.start).collect(), ..Held::default() };
        let (held, next_files, fault) = (Mutex::new(held), Mutex::default(), Mutex::default());
        Self(Arc::new(Inner {
            client,
            path,
            size_bytes,
            blocks,
            by_place,
            columns,
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

    /// Asks for the first blocks of a file that will be read soon, where `ahead` bytes are under way. Returns how many these are then, and
    /// whether there is no more to ask for.
    fn start(&self, ahead: u64) -> (u64, bool) {
        let (end, ahead) = self.0.within_reach(0, ahead);
        self.0.fetch_ahead(&mut self.0.held.lock().unwrap_or_else(PoisonError::into_inner), end);
        (ahead, end == self.0.blocks.len())
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
        let (end, mut ahead) = self.within_reach(number + 1, 0);
        self.fetch_ahead(&mut held, end);
        for file in self.next_files.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let is_all;
            (ahead, is_all) = file.start(ahead);
            if !is_all {
                break;
            }
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

    /// Up to which block there is room from a block on, where `ahead` bytes are under way, and how many these are then.
    fn within_reach(&self, first: usize, mut ahead: u64) -> (usize, u64) {
        let mut end = first;
        while let Some(block) = self.blocks.get(end)
            && (ahead == 0 || ahead + (block.end - block.start) <= BYTES_AHEAD)
        {
            ahead += block.end - block.start;
            end += 1;
        }
        (end, ahead)
    }

    /// Holds no longer what was read to its end with the bytes of a range: whoever has pages of it holds the memory.
    fn let_go(&self, range: &Range<u64>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let column = self.columns.partition_point(|column| column.end <= range.start);
        if let Some(read_to) = held.read_to.get_mut(column) {
            *read_to = range.end.max(*read_to);
        }
        let first = self.by_place.partition_point(|number| self.blocks[*number].end <= range.start);
        for number in self.by_place[first..].iter().take_while(|number| self.blocks[**number].start < range.end) {
            let block = &self.blocks[*number];
            let first = self.columns.partition_point(|column| column.end <= block.start);
            let mut within = (first..self.columns.len()).take_while(|column| self.columns[*column].start < block.end);
            if within.all(|column| held.read_to[column] >= self.columns[column].end.min(block.end)) {
                held.blocks.remove(number);
            }
        }
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

/// Fetches a range of a file, in parts at a time; less of it where the file ends.
async fn fetch(
    client: Arc<DynObjectStore>,
    path: Path,
    range: Range<u64>,
    buffers: Buffers,
) -> object_store::Result<Bytes> {
    let mut buffer = buffers.take(length(&range));
    let starts = (range.start..range.end).step_by(BLOCK_LEN);
    let parts = buffer.chunks_mut(BLOCK_LEN);
    let parts = starts.zip(parts).map(async |(start, part)| {
        let asked = GetOptions::new().with_range(Some(start..start + part.len() as u64));
        match client.get_opts(&path, asked).await?.payload {
            GetResultPayload::File(file, _) => Ok(Part::File(file)),
            GetResultPayload::Stream(mut pieces) => {
                let mut filled = 0;
                while let Some(piece) = pieces.try_next().await? {
                    let taken = piece.len().min(part.len() - filled);
                    part[filled..filled + taken].copy_from_slice(&piece[..taken]);
                    filled += taken;
                }
                Ok::<_, object_store::Error>(Part::Filled { len: filled, is_all: filled == part.len() })
            }
        }
    });
    let mut len = 0;
    for part in try_join_all(parts).await? {
        match part {
            Part::File(mut file) => {
                // One is as good as all.
                let fill = move || {
                    file.seek(SeekFrom::Start(range.start))?;
                    file.read_exact(&mut buffer).map(|()| buffer)
                };
                let failed = |fault| object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(fault) };
                return Ok(spawn_blocking(fill).await?.map_err(failed)?.freeze());
            }
            Part::Filled { len: filled, is_all } => {
                len += filled;
                if !is_all {
                    break;
                }
            }
        }
    }
    buffer.truncate(len);
    Ok(buffer.freeze())
}

/// What a request for a part of a block brings.
enum Part {
    /// So many bytes, where they belong.
    Filled { len: usize, is_all: bool },
    /// The file, to be read.
    File(std::fs::File),
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

/// Cuts the columns that will be read, which come in the order of the file, into blocks. What is small goes with what comes after it.
fn cut(columns: &[Range<u64>], size_bytes: u64) -> Vec<Range<u64>> {
    let mut blocks: Vec<Range<u64>> = Vec::new();
    for column in columns {
        let column = column.start..column.end.min(size_bytes);
        if column.is_empty() {
            continue;
        }
        let joined = blocks.pop_if(|last| {
            let together = column.end.saturating_sub(last.start);
            let is_near = column.start <= last.end.saturating_add(GAP_BYTES);
            let is_small = last.end - last.start <= GAP_BYTES;
            // What can stay whole does.
            let stays = together <= WHOLE_BYTES as u64 || column.end - column.start > WHOLE_BYTES as u64;
            is_near && (together <= BLOCK_BYTES || is_small && stays)
        });
        let block = joined.map_or(column.start, |last| last.start)..column.end;
        if block.end - block.start <= WHOLE_BYTES as u64 {
            blocks.push(block);
        } else {
            let starts = block.clone().step_by(BLOCK_LEN);
            blocks.extend(starts.map(|start| start..block.end.min(start + BLOCK_BYTES)));
        }
    }
    blocks
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
        let range = start..start.saturating_add(length as u64);
        let bytes = self.range(range.clone())?;
        self.0.let_go(&range);
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

    /// Blocks of the usual size under way.
    const BLOCKS_AHEAD: usize = 3;

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
        let (far, block, whole) = (GAP_BYTES + 1, BLOCK_BYTES, WHOLE_BYTES as u64);
        assert_eq!(cut(&[0..10, 20..30], 100), [0..30]);
        assert_eq!(cut(&[0..10, 10 + far..20 + far], u64::MAX), [0..10, 10 + far..20 + far]);
        // A footer may say more than there is.
        assert_eq!(cut(&[0..50, 90..900], 100), [0..100]);
        assert!(cut(&[7..7], 100).is_empty());

        // A column stays whole as long as it is not too large.
        assert_eq!(cut(&[5..5 + whole], u64::MAX), [5..5 + whole]);
        let blocks = cut(&[5..5 + whole + 1], u64::MAX);
        assert_eq!(blocks.len(), 5);
        assert_eq!((&blocks[0], &blocks[4]), (&(5..5 + block), &(5 + whole..6 + whole)));
        // Keys before pictures go with them, and keys after pictures with the next ones.
        let keys = |place: u64| place..place + 10;
        assert_eq!(cut(&[keys(0), 10..10 + 2 * block], u64::MAX), [0..10 + 2 * block]);
        let pictures = [0..2 * block, 2 * block + 10..4 * block];
        let columns = [pictures[0].clone(), keys(2 * block), pictures[1].clone(), keys(4 * block)];
        assert_eq!(cut(&columns, u64::MAX), [0..2 * block, 2 * block..4 * block, keys(4 * block)]);
        assert_eq!(cut(&[keys(0), 10..10 + whole], u64::MAX), [keys(0), 10..10 + whole]);
    }

    #[test]
    fn blocks_are_in_the_order_of_need_wherever_the_columns_lie() {
        let block = BLOCK_BYTES;
        // Two row groups, each with five blocks of pictures and after these keys.
        let groups = |keys: u64| {
            let group = |start: u64| vec![start..start + 5 * block, start + 5 * block..start + 5 * block + keys];
            [group(0), group(5 * block + keys)]
        };
        let numbers = |groups: &[Vec<Range<u64>>]| as_needed(&cut(&groups.concat(), u64::MAX), groups).1;
        // Few keys share a block with the first pictures of the next row group, and the last ones with the end of their own pictures.
        assert_eq!(numbers(&groups(10)), [0, 2, 3, 4, 5, 1, 7, 8, 9, 10, 6]);
        assert_eq!(numbers(&groups(2 * block)), [0, 2, 3, 4, 5, 1, 6, 8, 9, 10, 11, 7]);
        // As the file has them where keys come first.
        assert_eq!(numbers(&[vec![0..10, 10..10 + 5 * block]]), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn pages_of_a_whole_column_are_parts_of_its_block_which_is_held_until_it_is_read() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (keys, pictures) = (0..1000, 1000..3 * BLOCK_BYTES + 7);
        let file = file(&runtime, pictures.end, &[keys.clone(), pictures.clone()], 2);
        assert_eq!(file.0.blocks, [0..pictures.end]);
        let is_held = || !file.0.held.lock().unwrap().blocks.is_empty();
        let page = |range: Range<u64>| file.get_bytes(range.start, length(&range)).unwrap();
        let middle = 2 * BLOCK_BYTES;
        let (first, second) = (page(pictures.start..middle), page(middle..pictures.end));
        assert_eq!(first.as_ptr_range().end, second.as_ptr(), "one piece of memory");
        assert!(is_held(), "the keys are still to be read");
        assert!(page(keys.clone()).iter().copied().eq(keys.map(byte)));
        assert!(!is_held());
        assert!(first.iter().chain(&second).copied().eq(pictures.map(byte)));
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
        assert_eq!(file.start(BLOCK_BYTES), (BYTES_AHEAD, false));
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
        // The second one is small enough for a single block.
        for (block, begun) in [(0, (0, 0)), (1, (0, 0)), (2, (0, 0)), (3, (1, 0)), (4, (1, 1))] {
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
