//! Files that are as they were written, and files that are not.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::*;

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i * 7 % 50).collect()
}

fn config(folder: &Path) -> DiskCacheConfig {
    DiskCacheConfig {
        min_free_bytes: 0,
        ..DiskCacheConfig::new(folder)
    }
}

fn names(identity: &str, tokens: &[u32]) -> Vec<Name> {
    chain::names(chain::key(identity), tokens).collect()
}

/// Writes all chunks of some tokens, each with a block that says which it is.
fn fill(cache: &mut DiskCache, tokens: &[u32]) {
    cache.note(tokens);
    while let Some(piece) = cache.piece() {
        let block = format!("block {:?}", piece.range);
        futures::executor::block_on(cache.room());
        assert!(cache.write(&piece, block.as_bytes()));
    }
}

/// What is on disk, once all was read.
fn load(cache: &DiskCache, tokens: &[u32]) -> Vec<Vec<u8>> {
    let mut fetch = cache.fetch(tokens);
    while !fetch.is_over() {
        fetch.wait(Duration::from_mins(1));
    }
    fetch.into_blocks()
}

#[test]
fn names_tell_models_and_all_tokens_before_apart() {
    let some = tokens(1000);
    let first = names("a", &some);
    assert_eq!(first.len(), 3);
    assert_eq!(names("a", &some[..600]), first[..2]);
    let mut other = some.clone();
    other[0] += 1;
    assert!(names("a", &other).iter().zip(&first).all(|(a, b)| a != b));
    assert!(names("b", &some).iter().zip(&first).all(|(a, b)| a != b));
    let text = first[0].to_string();
    assert_eq!((text.len(), Name::parse(&text)), (64, Some(first[0])));
    assert_eq!(Name::parse("no name"), None);
    assert_eq!(Name::parse(&"é".repeat(32)), None);
}

#[test]
fn what_was_written_is_there_after_a_restart_for_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let open = |identity: &str| DiskCache::open(&config(folder.path()), identity).unwrap();
    let some = tokens(1000);
    fill(&mut open("a"), &some);
    let cache = open("a");
    assert_eq!(
        (
            cache.known(&some),
            cache.known(&some[..767]),
            cache.known(&some[1..])
        ),
        (768, 512, 0)
    );
    let blocks = load(&cache, &some);
    assert_eq!(blocks.len(), 3);
    assert_eq!(blocks[1], b"block 256..512");
    assert_eq!(open("b").known(&some), 0);
    // Nothing is written twice.
    let mut cache = open("a");
    cache.note(&some);
    assert_eq!(cache.piece(), None);
    cache.refuse(&some);
    assert_eq!((cache.known(&some), open("a").known(&some)), (0, 0));
}

#[test]
fn a_file_that_is_damaged_anywhere_is_a_miss() {
    let some = tokens(256);
    let name = names("a", &some)[0];
    let whole = file::encode(&name, &some, b"the block").unwrap();
    assert_eq!(file::decode(&whole, &name, &some).unwrap(), b"the block");
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            assert!(
                file::decode(&damaged, &name, &some).is_err(),
                "bit {bit} of byte {at}"
            );
        }
        assert!(file::decode(&whole[..at], &name, &some).is_err(), "cut at {at}");
    }
    let longer = [&whole[..], b"more"].concat();
    assert!(file::decode(&longer, &name, &some).is_err());
    // One that is whole, and is not what its name says.
    let other = names("b", &some)[0];
    assert!(
        file::decode(&whole, &other, &some)
            .unwrap_err()
            .contains("another model")
    );
    assert!(
        file::decode(&whole, &name, &tokens(257)[1..])
            .unwrap_err()
            .contains("tokens")
    );
}

#[test]
fn a_damaged_file_ends_what_is_found_and_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let some = tokens(768);
    fill(&mut DiskCache::open(&config(folder.path()), "a").unwrap(), &some);
    let cache = DiskCache::open(&config(folder.path()), "a").unwrap();
    let path = cache.store.path(&names("a", &some)[1]);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_eq!(load(&cache, &some).len(), 1);
    assert!(!path.exists());
    // Removed by somebody else.
    fs::remove_file(cache.store.path(&names("a", &some)[0])).unwrap();
    assert_eq!(load(&cache, &some).len(), 0);
}

#[test]
fn the_folder_keeps_to_its_limits() {
    let folder = tempfile::tempdir().unwrap();
    let some = tokens(256 * 4);
    let names = names("a", &some);
    let limits = |max_bytes, min_free_bytes| DiskCacheConfig {
        max_bytes,
        min_free_bytes,
        ..config(folder.path())
    };
    let with_free = |free| Access {
        free,
        ..Access::default()
    };
    let store = Store::open(&limits(25, 100), with_free(Box::new(|_| Ok(1000)))).unwrap();
    for name in &names[..2] {
        assert!(store.write(name, &[0; 10]).unwrap());
    }
    store.touch(&names[0]);
    assert!(store.write(&names[2], &[0; 10]).unwrap());
    assert!(
        store.has(&names[0]) && !store.has(&names[1]),
        "the one used least lately goes"
    );
    assert!(!store.path(&names[1]).exists());
    assert!(!store.write(&names[3], &[0; 26]).unwrap());
    let full = Store::open(&limits(1000, 100), with_free(Box::new(|_| Ok(105)))).unwrap();
    assert!(
        !full.write(&names[3], &[0; 10]).unwrap(),
        "the disk would be too full"
    );
    assert!(full.has(&names[0]) && full.has(&names[2]));

    // What another process wrote counts too.
    let [one, other] =
        [(), ()].map(|()| Store::open(&limits(35, 100), with_free(Box::new(|_| Ok(1000)))).unwrap());
    assert!(one.write(&names[1], &[0; 10]).unwrap());
    assert!(other.write(&names[3], &[0; 10]).unwrap());
    let left = names.iter().filter(|name| one.path(name).exists()).count();
    assert!(left == 3 && other.has(&names[1]), "{left}");

    // What does not belong there is left alone, but for files that were never finished.
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    fs::write(folder.path().join("a.1.part"), "half").unwrap();
    Store::open(&config(folder.path()), Access::default()).unwrap();
    assert!(folder.path().join("notes.txt").exists() && !folder.path().join("a.1.part").exists());
    let file = folder.path().join("notes.txt");
    let Err(refused) = DiskCache::open(&config(&file), "a") else {
        panic!("it is no folder")
    };
    assert_eq!(refused.field(), "prefix_cache.disk.folder");
}
