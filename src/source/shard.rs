//! `WebDataset` shards: tar archives, plain or compressed with gzip or zstd, whose members make samples.
//!
//! The key of a sample is the path of its members up to the first dot of the base name, and what follows that dot is the
//! extension: `a/b.c.jpg` is the member `c.jpg` of the sample `a/b`. Members of a sample stand together. Its **image** is the member
//! whose whole extension is that of an image (`jpg`); failing that, one whose extension ends so (`c.jpg`); of several, the first in
//! the archive. Members whose names begin with a dot (`._x.jpg`, which macOS adds) or have none are passed over, and so are folders
//! and links.
//!
//! An archive is read once from its beginning to its end, as it comes from the store: compressed ones cannot be read otherwise. No
//! more of it is held than one sample's image and texts, and of these none that is larger than allowed, whatever the headers say.

use std::collections::HashSet;
use std::io;

use async_compression::futures::bufread::{GzipDecoder, ZstdDecoder};
use futures::io::{AsyncRead, AsyncReadExt as _, Cursor};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectStoreExt as _;
use tar::{EntryType, Header};

use super::{IMAGE_ENDINGS, SourceError};
use crate::decode::Reject;
use crate::store::Store;

/// Tar archives are made of blocks of this many bytes.
const BLOCK_BYTES: usize = 512;

/// Bytes of an extended header at most: a path may have 4 KiB, and the other attributes are as small.
const MAX_EXTENDED_BYTES: u64 = 1 << 20;

/// Bytes passed over at a time.
const SKIP_BYTES: usize = 64 << 10;

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// What is wrong with a shard.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardFault {
    /// No byte.
    #[error("the file is empty")]
    Empty,
    /// The archive ends within a member or its header.
    #[error("the archive ends in the middle of a member")]
    Truncated,
    /// No tar header where one must be.
    #[error("there is no tar header here")]
    NoHeader,
    /// An extended header that says nothing, or too much.
    #[error("the extended header cannot be read")]
    ExtendedHeader,
    /// Other bytes than zeros behind the end-of-archive marker: a second archive, which would be lost.
    #[error("more data follows the end of the archive")]
    AfterEnd,
    /// Two members of a sample have one extension.
    #[error("the sample has a second member of this extension")]
    Repeated,
    /// A kept member is no text.
    #[error("the member is no UTF-8 text, but is named in [source] columns")]
    NotText,
    /// A kept member is stored with holes.
    #[error("the member is stored as a sparse file")]
    Sparse,
    /// The bytes are not what the compression says.
    #[error("cannot be unpacked")]
    Unpack(#[source] io::Error),
}

impl ShardFault {
    /// What to do about it, where there is more to say than the message does.
    pub(super) fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Empty | Self::Truncated | Self::Unpack(_) => {
                Some("the upload may have been cut off: write the shard again")
            }
            Self::AfterEnd => Some("archives cannot be joined with `cat`: keep them as shards of their own"),
            Self::NotText => Some("leave the extension out of [source] columns"),
            Self::Sparse => Some("pack the shard without `--sparse`"),
            Self::NoHeader | Self::ExtendedHeader | Self::Repeated => None,
        }
    }
}

/// What is taken of a shard's members.
#[derive(Debug, Clone)]
pub(super) struct Wanted<'a> {
    /// Extensions of the members kept as text.
    pub(super) columns: &'a [String],
    /// A larger member is not read.
    pub(super) max_member_bytes: u64,
    /// The samples to read; `None`: all.
    pub(super) keys: Option<&'a HashSet<String>>,
}

/// One sample.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) key: String,
    pub(super) image: Result<Vec<u8>, Reject>,
    /// Texts of the kept members, in the order of [`Wanted::columns`].
    pub(super) texts: Vec<Option<String>>,
    /// The extension that the image has, and how well it fits: 0 is best.
    image_member: Option<(String, u8)>,
    is_wanted: bool,
}

impl Sample {
    fn new(key: &str, wanted: &Wanted<'_>) -> Self {
        Self {
            key: key.to_owned(),
            image: Err(Reject::Missing),
            texts: vec![None; wanted.columns.len()],
            image_member: None,
            is_wanted: wanted.keys.is_none_or(|keys| keys.contains(key)),
        }
    }
}

/// A member's name and size, its content still unread.
#[derive(Debug)]
struct Member {
    path: String,
    size: u64,
    is_sparse: bool,
}

/// What the headers before a member say of it.
#[derive(Debug, Default)]
struct Extended {
    path: Option<String>,
    size: Option<u64>,
    is_sparse: bool,
}

/// A shard being read.
pub(super) struct Shard<'a> {
    store: &'a Store,
    name: &'a str,
    archive: Box<dyn AsyncRead + Send + Unpin>,
    wanted: Wanted<'a>,
    /// Bytes of the unpacked archive that were read.
    byte: u64,
    /// The member that is being read.
    member: Option<String>,
    open: Option<Sample>,
}

impl<'a> Shard<'a> {
    /// Opens a shard; its content, not its name, tells whether it is compressed.
    pub(super) async fn open(store: &'a Store, name: &'a str, wanted: Wanted<'a>) -> Result<Self, SourceError> {
        let answer = store.client().get(&store.path(name)?).await.map_err(|e| store.request("read", name, e))?;
        let mut packed = answer.into_stream().map_err(io::Error::from).boxed().into_async_read();
        let mut shard =
            Self { store, name, archive: Box::new(futures::io::empty()), wanted, byte: 0, member: None, open: None };
        let mut head = Vec::with_capacity(ZSTD_MAGIC.len());
        let read = (&mut packed).take(ZSTD_MAGIC.len() as u64).read_to_end(&mut head).await;
        read.map_err(|error| shard.io_error(error))?;
        if head.is_empty() {
            return Err(shard.fault(ShardFault::Empty));
        }
        let (is_gzip, is_zstd) = (head.starts_with(GZIP_MAGIC), head.starts_with(ZSTD_MAGIC));
        let packed = Cursor::new(head).chain(packed);
        // Both formats may be made of several parts, one after the other: pigz and pzstd write such.
        shard.archive = if is_gzip {
            let mut unpacked = GzipDecoder::new(packed);
            unpacked.multiple_members(true);
            Box::new(unpacked)
        } else if is_zstd {
            let mut unpacked = ZstdDecoder::new(packed);
            unpacked.multiple_members(true);
            Box::new(unpacked)
        } else {
            Box::new(packed)
        };
        Ok(shard)
    }

    /// The next sample that is wanted, in the order of the archive.
    pub(super) async fn next(&mut self) -> Result<Option<Sample>, SourceError> {
        loop {
            let Some(member) = self.next_member().await? else {
                return Ok(self.open.take().filter(|sample| sample.is_wanted));
            };
            let Some((key, extension)) = split(&member.path) else {
                self.skip(member.size).await?;
                continue;
            };
            let (mut sample, done) = match self.open.take() {
                Some(sample) if sample.key == key => (sample, None),
                done => (Sample::new(key, &self.wanted), done),
            };
            if sample.is_wanted {
                self.read_member(&member, extension, &mut sample).await?;
            } else {
                self.skip(member.size).await?;
            }
            self.open = Some(sample);
            if let Some(done) = done.filter(|sample| sample.is_wanted) {
                return Ok(Some(done));
            }
        }
    }

    /// Reads a member into its sample if the sample has use for it, and over it if not.
    async fn read_member(&mut self, member: &Member, extension: &str, sample: &mut Sample) -> Result<(), SourceError> {
        let limit = self.wanted.max_member_bytes;
        if let Some(column) = self.wanted.columns.iter().position(|name| name.eq_ignore_ascii_case(extension)) {
            if sample.texts[column].is_some() {
                return Err(self.fault(ShardFault::Repeated));
            }
            if member.is_sparse {
                return Err(self.fault(ShardFault::Sparse));
            }
            if member.size > limit {
                // The row says that something is missing; its text is null.
                sample.image = Err(Reject::TooLarge { bytes: member.size, limit });
                sample.image_member = Some((String::new(), 0));
                return self.skip(member.size).await;
            }
            let text = String::from_utf8(self.content(member.size).await?);
            sample.texts[column] = Some(text.map_err(|_| self.fault(ShardFault::NotText))?);
            return Ok(());
        }
        let Some(rank) = image_rank(extension) else {
            return self.skip(member.size).await;
        };
        if let Some((present, best)) = &sample.image_member {
            if present.eq_ignore_ascii_case(extension) {
                return Err(self.fault(ShardFault::Repeated));
            }
            if *best <= rank {
                return self.skip(member.size).await;
            }
        }
        sample.image_member = Some((extension.to_owned(), rank));
        if member.size > limit || member.is_sparse {
            sample.image = Err(if member.is_sparse {
                Reject::Unreadable { uri: format!("{}#{}", self.store.url_of(self.name), member.path) }
            } else {
                Reject::TooLarge { bytes: member.size, limit }
            });
            return self.skip(member.size).await;
        }
        sample.image = Ok(self.content(member.size).await?);
        Ok(())
    }

    /// The next regular file of the archive; its content must be read or skipped before the one after it.
    async fn next_member(&mut self) -> Result<Option<Member>, SourceError> {
        let mut extended = Extended::default();
        let mut begun = false;
        self.member = None;
        loop {
            let Some(block) = self.block().await? else {
                // GNU tar takes an archive without the marker at its end for whole if its members are.
                return if begun { Err(self.fault(ShardFault::Truncated)) } else { Ok(None) };
            };
            if block == [0; BLOCK_BYTES] {
                self.finish().await?;
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            let has_data = !matches!(
                header.entry_type(),
                EntryType::Link
                    | EntryType::Symlink
                    | EntryType::Char
                    | EntryType::Block
                    | EntryType::Directory
                    | EntryType::Fifo
            );
            let size = match header.entry_size() {
                Ok(size) if is_checksum_right(header) => size,
                _ => return Err(self.fault(ShardFault::NoHeader)),
            };
            begun = true;
            match header.entry_type() {
                EntryType::GNULongName => {
                    let path = self.extended(size).await?;
                    let end = path.iter().position(|byte| *byte == 0).unwrap_or(path.len());
                    extended.path.get_or_insert_with(|| String::from_utf8_lossy(&path[..end]).into_owned());
                    continue;
                }
                EntryType::XHeader => {
                    let records = self.extended(size).await?;
                    read_pax(&records, &mut extended).ok_or_else(|| self.fault(ShardFault::ExtendedHeader))?;
                    continue;
                }
                EntryType::GNULongLink | EntryType::XGlobalHeader => {
                    self.skip(size).await?;
                    continue;
                }
                _ => {}
            }
            let is_file =
                matches!(header.entry_type(), EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse);
            let Extended { path, size: extended_size, is_sparse } = std::mem::take(&mut extended);
            let path = path.unwrap_or_else(|| String::from_utf8_lossy(&header.path_bytes()).into_owned());
            let is_sparse = is_sparse || header.entry_type() == EntryType::GNUSparse;
            // The map of a sparse file goes on in further blocks.
            let mut map_goes_on =
                header.entry_type() == EntryType::GNUSparse && header.as_gnu().is_some_and(tar::GnuHeader::is_extended);
            while map_goes_on {
                let block = self.block().await?.ok_or_else(|| self.fault(ShardFault::Truncated))?;
                map_goes_on = block[SPARSE_GOES_ON] != 0;
            }
            self.member = Some(path.clone());
            let size = if has_data { extended_size.unwrap_or(size) } else { 0 };
            // The oldest archives tell folders by the slash alone.
            if is_file && !path.ends_with('/') {
                return Ok(Some(Member { path, size, is_sparse }));
            }
            self.skip(size).await?;
            begun = false;
        }
    }

    /// Reads what follows the first empty block: nothing but empty blocks. This is also what checks the sums of gzip and zstd.
    async fn finish(&mut self) -> Result<(), SourceError> {
        let mut buffer = vec![0; SKIP_BYTES];
        loop {
            let num_read = self.fill(&mut buffer).await?;
            if buffer[..num_read].iter().any(|byte| *byte != 0) {
                return Err(self.fault(ShardFault::AfterEnd));
            }
            if num_read < buffer.len() {
                return Ok(());
            }
        }
    }

    /// The next block, or `None` at the end of the file.
    async fn block(&mut self) -> Result<Option<[u8; BLOCK_BYTES]>, SourceError> {
        let mut block = [0; BLOCK_BYTES];
        match self.fill(&mut block).await? {
            0 => Ok(None),
            num_read if num_read == block.len() => Ok(Some(block)),
            _ => Err(self.fault(ShardFault::Truncated)),
        }
    }

    async fn extended(&mut self, size: u64) -> Result<Vec<u8>, SourceError> {
        if size > MAX_EXTENDED_BYTES {
            return Err(self.fault(ShardFault::ExtendedHeader));
        }
        self.content(size).await
    }

    /// Reads a member's content. Memory grows with the bytes that come, not with those that the header promises.
    async fn content(&mut self, size: u64) -> Result<Vec<u8>, SourceError> {
        let mut content = Vec::new();
        let read = (&mut self.archive).take(size).read_to_end(&mut content).await;
        self.byte += content.len() as u64;
        read.map_err(|error| self.io_error(error))?;
        if (content.len() as u64) < size {
            return Err(self.fault(ShardFault::Truncated));
        }
        self.skip_padding(size).await?;
        Ok(content)
    }

    /// Reads over a member's content.
    async fn skip(&mut self, size: u64) -> Result<(), SourceError> {
        let mut buffer = vec![0; SKIP_BYTES];
        let mut left = size;
        while left > 0 {
            let next = usize::try_from(left).unwrap_or(SKIP_BYTES).min(SKIP_BYTES);
            if self.fill(&mut buffer[..next]).await? < next {
                return Err(self.fault(ShardFault::Truncated));
            }
            left -= next as u64;
        }
        self.skip_padding(size).await
    }

    /// Reads over what fills the last block of a member. The archive may end there: the member is whole.
    async fn skip_padding(&mut self, size: u64) -> Result<(), SourceError> {
        let mut padding = [0; BLOCK_BYTES];
        let over = usize::try_from(size % BLOCK_BYTES as u64).unwrap_or(0);
        self.fill(&mut padding[..(BLOCK_BYTES - over) % BLOCK_BYTES]).await.map(|_| ())
    }

    /// Fills the buffer as far as the archive goes, and returns how far that is.
    async fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, SourceError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.archive.read(&mut buffer[filled..]).await {
                Ok(0) => break,
                Ok(num_read) => filled += num_read,
                Err(error) => {
                    self.byte += filled as u64;
                    return Err(self.io_error(error));
                }
            }
        }
        self.byte += filled as u64;
        Ok(filled)
    }

    /// The store's own error if it was the store that failed, else what it says of the shard.
    fn io_error(&self, error: io::Error) -> SourceError {
        match error.downcast::<object_store::Error>() {
            Ok(source) => self.store.request("read", self.name, source).into(),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.fault(ShardFault::Truncated),
            Err(error) => self.fault(ShardFault::Unpack(error)),
        }
    }

    fn fault(&self, fault: ShardFault) -> SourceError {
        let member = self.member.as_ref().map(|member| format!(", member `{member}`")).unwrap_or_default();
        SourceError::Shard { shard: self.store.url_of(self.name), byte: self.byte, member, source: fault }
    }
}

/// Where the header of a sparse file's map says whether another block of it follows.
const SPARSE_GOES_ON: usize = 504;

/// The sum of a header's bytes, where the field of the sum itself counts as blanks. Old programs took the bytes as signed.
fn is_checksum_right(header: &Header) -> bool {
    let Ok(expected) = header.cksum() else { return false };
    let bytes = header.as_bytes();
    let without_field = || bytes[..148].iter().chain(&bytes[156..]);
    let unsigned: u32 = without_field().map(|byte| u32::from(*byte)).sum::<u32>() + 8 * u32::from(b' ');
    let signed: i32 = without_field().map(|byte| i32::from(byte.cast_signed())).sum::<i32>() + 8 * i32::from(b' ');
    expected == unsigned || i64::from(expected) == i64::from(signed)
}

/// Takes what concerns us out of pax records, each `LENGTH KEY=VALUE\n`. `None` where they are none.
fn read_pax(mut records: &[u8], extended: &mut Extended) -> Option<()> {
    while !records.is_empty() {
        let blank = records.iter().position(|byte| *byte == b' ')?;
        let length: usize = str::from_utf8(&records[..blank]).ok()?.parse().ok()?;
        let record = records.get(blank + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"path" | b"GNU.sparse.name" => extended.path = Some(String::from_utf8_lossy(value).into_owned()),
            b"size" => extended.size = Some(str::from_utf8(value).ok()?.parse().ok()?),
            _ => {}
        }
        extended.is_sparse |= key.starts_with(b"GNU.sparse.");
        records = &records[length..];
    }
    Some(())
}

/// Key and extension of a member; `None` for those that belong to no sample.
fn split(path: &str) -> Option<(&str, &str)> {
    let base = path.rfind('/').map_or(0, |slash| slash + 1);
    match path[base..].find('.')? {
        0 => None,
        dot => Some((&path[..base + dot], &path[base + dot + 1..])),
    }
}

/// How well an extension fits an image, 0 best; `None` if not at all.
fn image_rank(extension: &str) -> Option<u8> {
    let is_image = |ending: &str| IMAGE_ENDINGS.iter().any(|known| known.eq_ignore_ascii_case(ending));
    let last = extension.rsplit('.').next().unwrap_or(extension);
    is_image(last).then_some(u8::from(last.len() < extension.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;
    use async_compression::futures::bufread::{GzipEncoder, ZstdEncoder};
    use url::Url;

    fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content) in members {
            let mut header = Header::new_gnu();
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, path, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    /// A block that is the header of a member of any kind, size and name.
    fn header(kind: EntryType, size: u64, path: &str) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_path(path).unwrap();
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn padded(content: &[u8]) -> Vec<u8> {
        let mut blocks = content.to_vec();
        blocks.resize(content.len().next_multiple_of(BLOCK_BYTES), 0);
        blocks
    }

    async fn read_with(
        shard: &[u8],
        columns: &[&str],
        keys: Option<&HashSet<String>>,
    ) -> Result<Vec<Sample>, SourceError> {
        let store = Stores::default().open(&Url::parse("memory:///shards").unwrap()).unwrap();
        store.put("x.tar", shard.to_vec().into()).await.unwrap();
        let columns: Vec<String> = columns.iter().map(|column| (*column).to_owned()).collect();
        let wanted = Wanted { columns: &columns, max_member_bytes: 2000, keys };
        let mut shard = Shard::open(&store, "x.tar", wanted).await?;
        let mut samples = Vec::new();
        while let Some(sample) = shard.next().await? {
            samples.push(sample);
        }
        Ok(samples)
    }

    async fn read(shard: &[u8]) -> Result<Vec<Sample>, SourceError> {
        read_with(shard, &["txt"], None).await
    }

    async fn fault(shard: &[u8]) -> (String, u64, ShardFault) {
        match read(shard).await {
            Err(SourceError::Shard { byte, member, source, .. }) => (member, byte, source),
            other => panic!("{other:?}"),
        }
    }

    fn keys(samples: &[Sample]) -> Vec<&str> {
        samples.iter().map(|sample| sample.key.as_str()).collect()
    }

    #[test]
    fn a_key_ends_at_the_first_dot_of_the_base_name() {
        assert_eq!(split("a/b.c.jpg"), Some(("a/b", "c.jpg")));
        assert_eq!(split("a.b/c.jpg"), Some(("a.b/c", "jpg")));
        assert_eq!(split("./c.jpg"), Some(("./c", "jpg")));
        assert_eq!(split("c."), Some(("c", "")));
        for none in ["c", "a.b/c", "._c.jpg", "a/.c.jpg", "a/", ""] {
            assert_eq!(split(none), None, "{none}");
        }
    }

    #[test]
    fn an_image_is_told_by_its_whole_extension_before_its_last_part() {
        assert_eq!(image_rank("JPG"), Some(0));
        assert_eq!(image_rank("seg.Png"), Some(1));
        assert_eq!(image_rank("jpg.txt"), None);
        assert_eq!(image_rank(""), None);
    }

    #[tokio::test]
    async fn samples_take_their_members_in_any_order_and_their_best_image() {
        let members: [(&str, &[u8]); 9] = [
            ("a.depth.png", b"depth"),
            ("a.txt", b"text of a"),
            ("a.jpg", b"image of a"),
            ("a.png", b"another"),
            ("b.json", b"{}"),
            ("._c.jpg", b"junk"),
            ("d/c.left.webp", b"left"),
            ("d/c.right.webp", b"right"),
            ("d/c.TXT", "ä".as_bytes()),
        ];
        let samples = read(&archive(&members)).await.unwrap();
        assert_eq!(keys(&samples), ["a", "b", "d/c"]);
        assert_eq!(samples[0].image, Ok(b"image of a".to_vec()));
        assert_eq!(samples[0].texts, [Some("text of a".to_owned())]);
        assert_eq!((&samples[1].image, &samples[1].texts), (&Err(Reject::Missing), &vec![None]));
        assert_eq!(samples[2].image, Ok(b"left".to_vec()));
        assert_eq!(samples[2].texts, [Some("ä".to_owned())]);
    }

    #[tokio::test]
    async fn samples_that_are_not_asked_for_are_passed_over() {
        let shard = archive(&[("a.jpg", b"a"), ("b.jpg", b"b"), ("b.txt", b"\xff"), ("c.jpg", b"c")]);
        let wanted = HashSet::from(["a".to_owned(), "c".to_owned(), "z".to_owned()]);
        assert_eq!(keys(&read_with(&shard, &["txt"], Some(&wanted)).await.unwrap()), ["a", "c"]);
        assert!(read_with(&shard, &[], Some(&HashSet::new())).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_shard_cut_off_anywhere_is_an_error_unless_its_members_are_whole() {
        let whole = archive(&[("a.jpg", &[7; 600]), ("b.txt", b"text"), ("b.jpg", &[8; 512])]);
        // How many samples there are at each end of a member, with or without what fills its last block.
        let ends =
            [(512 + 600..=512 + 1024, 1), (2048 + 4..=2048 + 512, 2), (3072 + 512..=3072 + 512, 2), (4096..=4096, 2)];
        for length in 0..whole.len() {
            let found = read(&whole[..length]).await;
            match ends.iter().find(|(end, _)| end.contains(&length)) {
                Some((_, num_samples)) => assert_eq!(keys(&found.unwrap()), ["a", "b"][..*num_samples], "{length}"),
                // Of the marker at the end, one block is enough, and none is needed.
                None if length > 4096 => assert_eq!(keys(&found.unwrap()), ["a", "b"], "{length}"),
                None => assert!(found.is_err(), "{length}"),
            }
        }
        let (member, byte, source) = fault(&whole[..3100]).await;
        assert!(matches!(source, ShardFault::Truncated), "{source}");
        assert_eq!((member.as_str(), byte), (", member `b.jpg`", 3100));
    }

    #[tokio::test]
    async fn a_compressed_shard_is_whole_or_an_error() {
        let plain = archive(&[("a.jpg", b"image of a"), ("b.jpg", &[8; 1500])]);
        // Two parts, as pigz and pzstd write them; where the first ends, the archive does not.
        let (first, second) = plain.split_at(400);
        for packed in [[gzip(first), gzip(second)].concat(), [zstd(first), zstd(second)].concat()] {
            assert_eq!(keys(&read(&packed).await.unwrap()), ["a", "b"]);
            for length in 0..packed.len() {
                assert!(read(&packed[..length]).await.is_err(), "{length} of {}", packed.len());
            }
            let mut flipped = packed.clone();
            let middle = packed.len() - 20;
            flipped[middle] ^= 4;
            assert!(read(&flipped).await.is_err());
        }
    }

    fn gzip(plain: &[u8]) -> Vec<u8> {
        read_all(GzipEncoder::new(plain))
    }

    /// With the sum of the content, as the program `zstd` writes it.
    fn zstd(plain: &[u8]) -> Vec<u8> {
        let sum = async_compression::zstd::CParameter::checksum_flag(true);
        read_all(ZstdEncoder::with_quality_and_params(plain, async_compression::Level::Default, &[sum]))
    }

    fn read_all(mut stream: impl AsyncRead + Unpin) -> Vec<u8> {
        let mut bytes = Vec::new();
        futures::executor::block_on(stream.read_to_end(&mut bytes)).unwrap();
        bytes
    }

    #[tokio::test]
    async fn a_store_that_fails_is_not_a_broken_shard() {
        let store = Stores::default().open(&Url::parse("memory:///shards").unwrap()).unwrap();
        let plain = archive(&[("a.jpg", b"image of a"), ("b.jpg", &[8; 1500])]);
        store.put("x.tar", plain.clone().into()).await.unwrap();
        let packed = gzip(&plain);
        for bytes in [plain, packed.clone()] {
            let wanted = Wanted { columns: &[], max_member_bytes: 2000, keys: None };
            let mut shard = Shard::open(&store, "x.tar", wanted).await.unwrap();
            let reset = object_store::Error::Generic { store: "test", source: "connection reset".into() };
            let stream = futures::stream::iter([Ok(bytes[..bytes.len() / 2].to_vec()), Err(io::Error::from(reset))]);
            let stream = stream.into_async_read();
            shard.archive = if bytes == packed { Box::new(GzipDecoder::new(stream)) } else { Box::new(stream) };
            let error = loop {
                match shard.next().await {
                    Ok(sample) => assert!(sample.is_some(), "the archive seems to end"),
                    Err(error) => break error,
                }
            };
            assert!(matches!(&error, SourceError::Store(error) if error.to_string().contains("x.tar")), "{error:?}");
        }
    }

    #[tokio::test]
    async fn what_is_no_archive_says_where() {
        assert!(matches!(fault(b"").await, (_, 0, ShardFault::Empty)));
        assert!(matches!(fault(&[b'x'; 1024]).await, (_, 512, ShardFault::NoHeader)));
        let mut twice = archive(&[("a.jpg", b"a")]);
        twice.extend(archive(&[("b.jpg", b"b")]));
        assert!(matches!(fault(&twice).await.2, ShardFault::AfterEnd));
        let repeated = archive(&[("a.jpg", b"1"), ("a.JPG", b"2")]);
        assert!(matches!(fault(&repeated).await.2, ShardFault::Repeated));
        let (member, _, source) = fault(&archive(&[("a.txt", b"\xff")])).await;
        assert!(matches!(source, ShardFault::NotText), "{source}");
        assert_eq!(member, ", member `a.txt`");
    }

    #[tokio::test]
    async fn members_that_are_too_large_are_rows_without_an_image() {
        let shard = archive(&[("a.jpg", &[1; 2001]), ("b.jpg", &[1; 2000]), ("c.jpg", b"c"), ("c.txt", &[b'x'; 2001])]);
        let samples = read(&shard).await.unwrap();
        let too_large = Err(Reject::TooLarge { bytes: 2001, limit: 2000 });
        assert_eq!([&samples[0].image, &samples[2].image], [&too_large, &too_large]);
        assert!(samples[1].image.is_ok());
        assert_eq!(samples[2].texts, [None]);
    }

    #[tokio::test]
    async fn long_names_links_folders_and_sparse_files_are_read_as_tar_does() {
        let long = format!("{}/{}.jpg", "f".repeat(120), "n".repeat(150));
        let mut shard = header(EntryType::XGlobalHeader, 30, "global");
        shard.extend(padded(b"30 comment=of the whole file.\n"));
        shard.extend(header(EntryType::Directory, 0, "a/"));
        shard.extend(header(EntryType::Link, 700, "a/linked.jpg"));
        shard.extend(header(EntryType::Symlink, 0, "a/soft.jpg"));
        // A name in pax records, where another value holds a line break and no text.
        let records = [&b"26 SCHILY.xattr.x=\xff\n3 y=z\n"[..], &b"18 path=pax/p.jpg\n"[..]].concat();
        shard.extend(header(EntryType::XHeader, records.len() as u64, "PaxHeaders/x"));
        shard.extend(padded(&records));
        shard.extend(header(EntryType::Regular, 3, "short.jpg"));
        shard.extend(padded(b"pax"));
        // A sparse file whose map goes on in two more blocks.
        let mut sparse = Header::new_gnu();
        sparse.set_entry_type(EntryType::GNUSparse);
        sparse.set_size(5);
        sparse.set_path("s.png").unwrap();
        sparse.as_gnu_mut().unwrap().set_is_extended(true);
        sparse.set_cksum();
        shard.extend(sparse.as_bytes());
        shard.extend([vec![0; SPARSE_GOES_ON], vec![1; 8], vec![0; BLOCK_BYTES]].concat());
        shard.extend(padded(b"holes"));
        shard.extend(archive(&[(&long, b"long"), ("last.jpg", b"last")]));
        let samples = read(&shard).await.unwrap();
        assert_eq!(keys(&samples), ["pax/p", "s", long.strip_suffix(".jpg").unwrap(), "last"]);
        assert!(matches!(&samples[1].image, Err(Reject::Unreadable { uri }) if uri.ends_with("x.tar#s.png")));
        assert_eq!(samples[3].image, Ok(b"last".to_vec()));
    }

    #[tokio::test]
    async fn headers_that_promise_more_than_there_is_take_no_memory() {
        let huge = [header(EntryType::Regular, 1 << 40, "a.jpg"), vec![0; 700]].concat();
        assert!(matches!(fault(&huge).await, (_, 1212, ShardFault::Truncated)));
        let name = [header(EntryType::GNULongName, 1 << 33, "x"), vec![b'x'; 2048]].concat();
        assert!(matches!(fault(&name).await, (_, 512, ShardFault::ExtendedHeader)));
        let records = [header(EntryType::XHeader, 9, "x"), padded(b"99 path=x")].concat();
        assert!(matches!(fault(&records).await.2, ShardFault::ExtendedHeader));
    }

    #[test]
    fn pax_records_go_by_their_length() {
        let mut extended = Extended::default();
        let records = b"18 path=a\nb.jpg.x\n22 GNU.sparse.major=1\n12 size=123\n";
        read_pax(records, &mut extended).unwrap();
        assert_eq!(
            (extended.path.as_deref(), extended.size, extended.is_sparse),
            (Some("a\nb.jpg.x"), Some(123), true)
        );
        for broken in ["5 path=abc\n", "0 a=b\n", "x", "99 a=b\n", "7 path\n"] {
            assert!(read_pax(broken.as_bytes(), &mut Extended::default()).is_none(), "{broken:?}");
        }
    }
}
