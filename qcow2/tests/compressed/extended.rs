//! Compressed and plain clusters replace one another in extended L2 entries: what is replaced is
//! freed once, whoever else refers to it.

use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;
use tidemark_qcow2::{CompressionType, CreateOptions, Image};

use crate::common::{alone, create_file, open_file, read_all, reading};
use crate::{KINDS, text, to_u64, to_usize};

/// One change of a guest cluster, at `start`, of `cluster` bytes.
type Change = fn(&Guest<'_>, start: u64, cluster: u64);

/// What every byte of the cluster was and becomes: nothing, data, zeros in any mixture.
const CHANGES: [Change; 9] = [
    |_, _, _| (),
    |guest, start, cluster| guest.write(start, cluster),
    |guest, start, cluster| guest.write(start + cluster / 4 + 100, cluster / 8),
    |guest, start, cluster| guest.zero(start, cluster),
    |guest, start, cluster| guest.zero(start + cluster / 2, cluster / 4),
    |guest, start, cluster| guest.compress(start, cluster),
    |guest, start, cluster| {
        guest.write(start, cluster / 2);
        guest.zero(start + cluster / 8, cluster / 8);
    },
    |guest, start, cluster| guest.discard(start, cluster),
    |guest, start, cluster| guest.discard(start + cluster / 2, cluster / 2),
];

struct Guest<'a> {
    image: &'a Image,
    content: std::cell::RefCell<Vec<u8>>,
}

impl Guest<'_> {
    fn set(&self, start: u64, data: &[u8]) {
        let at = to_usize(start);
        self.content.borrow_mut()[at..at + data.len()].copy_from_slice(data);
    }

    fn write(&self, start: u64, len: u64) {
        let data = text(start + len, to_usize(len));
        self.image.write(&data, start).unwrap();
        self.set(start, &data);
    }

    fn compress(&self, start: u64, len: u64) {
        let data = text(start + 2 * len, to_usize(len));
        self.image.write_compressed(&data, start).unwrap();
        self.set(start, &data);
    }

    fn zero(&self, start: u64, len: u64) {
        self.image.write_zeroes(start, len).unwrap();
        self.set(start, &vec![0; to_usize(len)]);
    }

    /// Discarded subclusters read as zero; those of a compressed cluster stay.
    fn discard(&self, start: u64, len: u64) {
        self.image.discard(start, len).unwrap();
        let range = to_usize(start)..to_usize(start + len);
        let old = self.content.borrow()[range.clone()].to_vec();
        let mut new = vec![0; to_usize(len)];
        self.image.read(&mut new, start).unwrap();
        assert!(new == old || new.iter().all(|&byte| byte == 0));
        self.set(start, &new);
    }
}

/// Nothing leaks, and no reference is missing.
fn assert_exact(image: &Image, what: &str) {
    image.flush().unwrap();
    let report = image.check().unwrap();
    assert!(report.is_clean(), "{what}: {:?}", report.findings);
}

/// Every change over every other, in guest clusters of their own; returns how many.
fn replace_all(kind: CompressionType, cluster_bits: u32, shared: bool) -> usize {
    let cluster = 1 << cluster_bits;
    let pairs = CHANGES.len() * CHANGES.len();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let options = CreateOptions {
        cluster_bits,
        extended_l2: true,
        compression_type: kind,
        ..CreateOptions::new(to_u64(pairs) * cluster)
    };
    let image = create_file(&path, &options);
    let guest = Guest {
        image: &image,
        content: vec![0; to_usize(options.size)].into(),
    };
    let place = |pair: usize| to_u64(pair) * cluster;
    for pair in 0..pairs {
        CHANGES[pair / CHANGES.len()](&guest, place(pair), cluster);
    }
    assert_exact(&image, "before");
    let old = guest.content.borrow().clone();
    if shared {
        image.create_snapshot("old").unwrap();
    }
    for pair in 0..pairs {
        CHANGES[pair % CHANGES.len()](&guest, place(pair), cluster);
        let what = format!("{kind:?}, shared {shared}, pair {pair}");
        assert_exact(&image, &what);
    }
    let content = guest.content.borrow().clone();
    assert!(read_all(&image) == content);
    image.close().unwrap();
    qemu_img::check(&path).assert_clean();
    assert!(qemu_img::convert_to_raw(&path) == content);
    if shared {
        let image = open_file(
            &path,
            tidemark_qcow2::OpenOptions {
                writable: true,
                ..reading()
            },
        );
        image.apply_snapshot("old").unwrap();
        image.delete_snapshot("old").unwrap();
        assert!(read_all(&image) == old);
        assert_exact(&image, "applied");
        image.close().unwrap();
        qemu_img::check(&path).assert_clean();
        assert!(qemu_img::convert_to_raw(&path) == old);
    }
    pairs
}

#[test]
fn what_is_replaced_in_extended_entries_is_freed_once() {
    require_qemu!();
    let _turn = alone();
    let mut pairs = 0;
    for kind in KINDS {
        for cluster_bits in [14, 16] {
            for shared in [false, true] {
                pairs += replace_all(kind, cluster_bits, shared);
            }
        }
    }
    println!("{pairs} changes over another");
    assert_eq!(pairs, 648);
}
