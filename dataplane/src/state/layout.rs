//! The bytes of a state segment (`docs/wire.md` is the same in prose): where things are, computed from the schema alone.
//!
//! Offsets are never read from a segment: they follow from the directory's kinds, sizes and counts, which are checked
//! against the mapping's size before anything is touched.

use std::sync::Arc;

use super::{damaged, full, usage, Result, StateError};

pub const MAGIC: u64 = u64::from_le_bytes(*b"SNAPSTA1");
pub const LAYOUT: u32 = 1;
pub const PAGE: usize = 4096;

/// The header's constant part: written by `format`, checksummed with the directory.
pub const OFF_MAGIC: usize = 0;
pub const OFF_LAYOUT: usize = 8;
pub const OFF_OBJECTS: usize = 12;
pub const OFF_SIZE: usize = 16;
pub const OFF_LOG_BYTES: usize = 24;
pub const OFF_SEED: usize = 32;
pub const OFF_VERSION: usize = 48;
pub const OFF_OLDEST: usize = 52;
pub const OFF_ENGINE: usize = 64;
pub const OFF_SCHEMA: usize = 128;
pub const NAME: usize = 64;
pub const CONSTANT: usize = 192;
pub const OFF_CRC: usize = 192;

/// One line per engine channel (a gate line), two copies of its cursors: the ledger knows what is in them.
pub const OFF_CURSORS: usize = PAGE;
pub const CURSOR_LINES: usize = 1024;
pub const CURSOR_WORDS: usize = 16;
pub const CURSOR: usize = CURSOR_WORDS * 8;

pub const OFF_DIRECTORY: usize = OFF_CURSORS + CURSOR_LINES * CURSOR;
pub const MAX_OBJECTS: usize = 32;
pub const ENTRY: usize = 2048;
pub const ENTRY_KIND: usize = 0;
pub const ENTRY_KEY: usize = 4;
pub const ENTRY_ITEM: usize = 8;
pub const ENTRY_COUNT: usize = 16;
pub const ENTRY_FIELDS: usize = 24;
pub const ENTRY_NAME: usize = 32;
pub const ENTRY_TEXT: usize = ENTRY_NAME + NAME;

/// Two snapshots, the newest committed one counts: stamp u64, length u32, crc u32, bytes from 64 on.
pub const OFF_SNAPSHOTS: usize = OFF_DIRECTORY + MAX_OBJECTS * ENTRY;
pub const SNAPSHOT_MAX: usize = 65536;
pub const SNAPSHOT_HEAD: usize = 64;
pub const SNAPSHOT: usize = SNAPSHOT_HEAD + SNAPSHOT_MAX;

pub const OFF_LOG: usize = (OFF_SNAPSHOTS + 2 * SNAPSHOT).next_multiple_of(PAGE);
/// The default size of the undo log: what one poll may overwrite.
pub const LOG_BYTES: usize = 1 << 20;
const LOG_MAX: usize = 1 << 32;
/// After the old bytes: offset u64, length u32, crc u32.
pub const FOOTER: usize = 16;

/// A segment with the default log and room for the rounding of every object.
pub const MIN_BYTES: usize = OFF_LOG + LOG_BYTES + MAX_OBJECTS * 2 * PAGE;

/// Counters of an object: `used` (high-water mark), `live`, and for tables the first freed slot + 1.
pub const META: usize = 64;
pub const META_USED: usize = 0;
pub const META_LIVE: usize = 8;
pub const META_FREE: usize = 16;
pub const META_WORDS: usize = 3;

pub const KEY_MAX: usize = 1024;
const ITEM_MAX: usize = 1 << 30;
const COUNT_MAX: usize = 1 << 31;
/// Bytes of an array that share a checksum, unless one item is larger.
const BLOCK: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    Table = 1,
    Slab = 2,
    Array = 3,
}

impl Kind {
    pub const NAMES: [(&'static str, Kind); 3] = [("table", Kind::Table), ("slab", Kind::Slab), ("array", Kind::Array)];

    pub fn name(self) -> &'static str {
        Kind::NAMES[self as usize - 1].0
    }

    pub fn named(name: &str) -> Option<Kind> {
        Kind::NAMES.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind)
    }

    fn from_number(number: u32) -> Option<Kind> {
        Kind::NAMES.iter().find(|(_, kind)| *kind as u32 == number).map(|(_, kind)| *kind)
    }
}

/// What an engine asks for: `key` bytes (tables only), `item` bytes, at most `count` of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectSpec {
    pub kind: Kind,
    pub name: String,
    pub key: usize,
    pub item: usize,
    pub count: usize,
    /// JSON that describes the fields of an item, for inspection only.
    pub fields: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schema {
    pub engine: String,
    pub name: String,
    pub version: u32,
    /// The oldest version whose code can read this state.
    pub oldest: u32,
    pub objects: Vec<ObjectSpec>,
}

/// An object at its place; offsets in bytes from the start of the segment.
#[derive(Clone, Debug)]
pub struct Object {
    pub spec: ObjectSpec,
    pub id: usize,
    pub meta: usize,
    /// One bit per unit (slot, item or block).
    pub dirty: usize,
    pub units: usize,
    /// Tables: `index_len` words of hash and slot. Slabs: `index_len` words of liveness.
    pub index: usize,
    pub index_len: usize,
    /// Slabs and arrays: a u32 per unit.
    pub crc: usize,
    pub data: usize,
    /// Bytes of a slot, an item or a whole block.
    pub stride: usize,
    pub data_len: usize,
}

impl Object {
    /// Items that share a checksum (arrays; else 1).
    pub fn per_block(&self) -> usize {
        if self.spec.kind == Kind::Array {
            self.stride / self.spec.item
        } else {
            1
        }
    }

    /// Bytes of unit `unit`: the last block of an array may be short.
    pub fn unit_len(&self, unit: usize) -> usize {
        self.stride.min(self.data_len - unit * self.stride)
    }

    fn place(spec: ObjectSpec, id: usize, start: usize) -> Option<(Object, usize)> {
        let (stride, units) = match spec.kind {
            Kind::Table => ((8 + spec.key + spec.item).next_multiple_of(8), spec.count),
            Kind::Slab => (spec.item, spec.count),
            Kind::Array => {
                let per_block = (BLOCK / spec.item).max(1);
                (per_block * spec.item, spec.count.div_ceil(per_block))
            }
        };
        let bits = units.div_ceil(64);
        let dirty = start + META;
        let index = (dirty + bits * 8).next_multiple_of(64);
        let index_len = match spec.kind {
            Kind::Table => spec.count + spec.count / 2 + 8,
            Kind::Slab => bits,
            Kind::Array => 0,
        };
        let crc = index + index_len * 8;
        let crc_len = if spec.kind == Kind::Table { 0 } else { units * 4 };
        let data = (crc + crc_len).next_multiple_of(PAGE);
        let data_len = match spec.kind {
            Kind::Array => spec.count.checked_mul(spec.item)?,
            _ => units.checked_mul(stride)?,
        };
        let end = data.checked_add(data_len)?.checked_next_multiple_of(PAGE)?;
        (end <= isize::MAX as usize).then_some(())?;
        Some((Object { spec, id, meta: start, dirty, units, index, index_len, crc, data, stride, data_len }, end))
    }
}

/// Check a schema and lay its objects out; returns them and the bytes that the segment needs.
pub fn place(schema: &Schema, log_bytes: usize) -> Result<(Vec<Arc<Object>>, usize)> {
    if schema.objects.len() > MAX_OBJECTS {
        return usage(format!(
            "{} objects are more than the {MAX_OBJECTS} that a state can have",
            schema.objects.len()
        ));
    }
    if log_bytes % PAGE != 0 || log_bytes == 0 || log_bytes > LOG_MAX {
        return usage(format!("an undo log of {log_bytes} bytes: must be a multiple of {PAGE}, at most {LOG_MAX}"));
    }
    for name in [&schema.engine, &schema.name] {
        check_name(name)?;
    }
    if schema.oldest > schema.version {
        return usage(format!("the oldest readable version {} is newer than {}", schema.oldest, schema.version));
    }
    let mut objects: Vec<Arc<Object>> = Vec::with_capacity(schema.objects.len());
    let mut end = OFF_LOG + log_bytes;
    for (id, spec) in schema.objects.iter().enumerate() {
        check_spec(spec)?;
        if objects.iter().any(|other| other.spec.name == spec.name) {
            return usage(format!("two objects are called {:?}", spec.name));
        }
        let Some((object, next)) = Object::place(spec.clone(), id, end) else {
            return usage(format!("{:?} is larger than any memory", spec.name));
        };
        objects.push(Arc::new(object));
        end = next;
    }
    Ok((objects, end))
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() >= NAME || name.bytes().any(|byte| byte == 0) {
        return usage(format!("{name:?} is no name of 1 to {} bytes", NAME - 1));
    }
    Ok(())
}

fn check_spec(spec: &ObjectSpec) -> Result<()> {
    check_name(&spec.name)?;
    let key_fits = match spec.kind {
        Kind::Table => (1..=KEY_MAX).contains(&spec.key),
        _ => spec.key == 0,
    };
    if !key_fits {
        return usage(format!("{:?}: keys of {} bytes (tables: 1 to {KEY_MAX}, others: 0)", spec.name, spec.key));
    }
    let item_fits = spec.item <= ITEM_MAX && (spec.item > 0 || spec.kind == Kind::Table);
    if !item_fits || spec.count == 0 || spec.count > COUNT_MAX {
        return usage(format!("{:?}: {} items of {} bytes are out of range", spec.name, spec.count, spec.item));
    }
    if spec.fields.len() > ENTRY - ENTRY_TEXT {
        return usage(format!("{:?}: its fields take more than {} bytes of JSON", spec.name, ENTRY - ENTRY_TEXT));
    }
    Ok(())
}

/// The constant part of a header and the directory, as private bytes.
pub struct Constant {
    pub head: [u8; CONSTANT],
    pub directory: Vec<u8>,
}

impl Constant {
    pub fn crc(&self) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.head), &self.directory)
    }
}

/// What `parse` found, checked.
pub struct Parsed {
    pub schema: Schema,
    pub size: usize,
    pub log_bytes: usize,
    pub seed: [u64; 2],
}

pub fn emit(parsed: &Parsed) -> Constant {
    let schema = &parsed.schema;
    let mut head = [0; CONSTANT];
    put(&mut head, OFF_MAGIC, &MAGIC.to_le_bytes());
    put(&mut head, OFF_LAYOUT, &LAYOUT.to_le_bytes());
    put(&mut head, OFF_OBJECTS, &(schema.objects.len() as u32).to_le_bytes());
    put(&mut head, OFF_SIZE, &(parsed.size as u64).to_le_bytes());
    put(&mut head, OFF_LOG_BYTES, &(parsed.log_bytes as u64).to_le_bytes());
    put(&mut head, OFF_SEED, &parsed.seed[0].to_le_bytes());
    put(&mut head, OFF_SEED + 8, &parsed.seed[1].to_le_bytes());
    put(&mut head, OFF_VERSION, &schema.version.to_le_bytes());
    put(&mut head, OFF_OLDEST, &schema.oldest.to_le_bytes());
    put(&mut head, OFF_ENGINE, schema.engine.as_bytes());
    put(&mut head, OFF_SCHEMA, schema.name.as_bytes());
    let mut directory = vec![0; schema.objects.len() * ENTRY];
    for (spec, entry) in schema.objects.iter().zip(directory.chunks_exact_mut(ENTRY)) {
        put(entry, ENTRY_KIND, &(spec.kind as u32).to_le_bytes());
        put(entry, ENTRY_KEY, &(spec.key as u32).to_le_bytes());
        put(entry, ENTRY_ITEM, &(spec.item as u64).to_le_bytes());
        put(entry, ENTRY_COUNT, &(spec.count as u64).to_le_bytes());
        put(entry, ENTRY_FIELDS, &(spec.fields.len() as u64).to_le_bytes());
        put(entry, ENTRY_NAME, spec.name.as_bytes());
        put(entry, ENTRY_TEXT, spec.fields.as_bytes());
    }
    Constant { head, directory }
}

/// The number of objects that a header claims, so that as much of the directory can be read.
pub fn claimed_objects(head: &[u8; CONSTANT]) -> Result<usize> {
    if u64_in(head, OFF_MAGIC) != MAGIC {
        return damaged("wrong magic in the state's header");
    }
    let layout = u32_in(head, OFF_LAYOUT);
    if layout != LAYOUT {
        return Err(StateError::Schema(format!("the state has layout {layout}, this code reads {LAYOUT}")));
    }
    let objects = u32_in(head, OFF_OBJECTS) as usize;
    if objects > MAX_OBJECTS {
        return damaged(format!("the state's header claims {objects} objects"));
    }
    Ok(objects)
}

/// Check a header and directory that anybody may have written, against their checksum and the segment's real size.
pub fn parse(constant: &Constant, crc: u32, real_size: usize) -> Result<(Parsed, Vec<Arc<Object>>)> {
    let head = &constant.head;
    if constant.crc() != crc {
        return damaged("the checksum of the state's header and directory does not match");
    }
    let specs = constant.directory.chunks_exact(ENTRY).map(parse_entry).collect::<Result<Vec<_>>>()?;
    let schema = Schema {
        engine: text(&head[OFF_ENGINE..OFF_ENGINE + NAME])?,
        name: text(&head[OFF_SCHEMA..OFF_SCHEMA + NAME])?,
        version: u32_in(head, OFF_VERSION),
        oldest: u32_in(head, OFF_OLDEST),
        objects: specs,
    };
    let log_bytes = u64_in(head, OFF_LOG_BYTES) as usize;
    let size = u64_in(head, OFF_SIZE) as usize;
    let (objects, needed) =
        place(&schema, log_bytes).map_err(|error| StateError::Damaged(format!("the state's directory: {error}")))?;
    if needed > size || size > real_size {
        return damaged(format!("the state claims {size} bytes and needs {needed}, its segment has {real_size}"));
    }
    let seed = [u64_in(head, OFF_SEED), u64_in(head, OFF_SEED + 8)];
    Ok((Parsed { schema, size, log_bytes, seed }, objects))
}

fn parse_entry(entry: &[u8]) -> Result<ObjectSpec> {
    let Some(kind) = Kind::from_number(u32_in(entry, ENTRY_KIND)) else {
        return damaged("an object of unknown kind in the state's directory");
    };
    let fields = u64_in(entry, ENTRY_FIELDS) as usize;
    if fields > ENTRY - ENTRY_TEXT {
        return damaged("a description in the state's directory exceeds its place");
    }
    Ok(ObjectSpec {
        kind,
        name: text(&entry[ENTRY_NAME..ENTRY_NAME + NAME])?,
        key: u32_in(entry, ENTRY_KEY) as usize,
        item: u64_in(entry, ENTRY_ITEM) as usize,
        count: u64_in(entry, ENTRY_COUNT) as usize,
        fields: text_of(&entry[ENTRY_TEXT..ENTRY_TEXT + fields])?,
    })
}

fn text(field: &[u8]) -> Result<String> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    text_of(&field[..end])
}

fn text_of(bytes: &[u8]) -> Result<String> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => damaged("a text in the state's header is not UTF-8"),
    }
}

/// Raises `Full` with both sizes in words.
pub fn check_fits(needed: usize, size: usize) -> Result<()> {
    if needed > size {
        return full(format!("the objects need a segment of {needed} bytes, this one has {size}"));
    }
    Ok(())
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u32_in(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_in(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
