//! Descriptors: XML both ways, the store, redefinition, and images that disagree.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;

use common::{close, create, domain_with, media, names, spec};
use proptest::prelude::*;
use tidemark_checkpoint::{
    CreateFlags, CreateSpec, DeleteFlags, DescribedDisk, Descriptor, Disk, Domain, DomainOptions,
    Error, ErrorCode, ListFlags, ListOptions, Problem, Store, XmlFlags,
};
use tidemark_qcow2::chain::{Health, Identity, ImageUuid};

fn texts() -> impl Strategy<Value = String> {
    proptest::collection::vec(
        prop_oneof![
            Just('<'),
            Just('&'),
            Just('\''),
            Just('"'),
            Just('\n'),
            Just('\t'),
            Just('\r'),
            Just(']'),
            Just('>'),
            proptest::char::range(' ', '\u{d7ff}'),
            proptest::char::range('\u{10000}', '\u{10ffff}'),
        ],
        1..20,
    )
    .prop_map(|characters| characters.into_iter().collect())
}

type DiskFields = (bool, Option<u64>, Option<[u8; 16]>);

fn described((name, (bitmap, changed_bytes, image)): (String, DiskFields)) -> DescribedDisk {
    DescribedDisk {
        name,
        bitmap,
        changed_bytes: changed_bytes.filter(|_| bitmap),
        image: image.map(ImageUuid),
    }
}

fn descriptors() -> impl Strategy<Value = Descriptor> {
    let disk = (
        any::<bool>(),
        any::<Option<u64>>(),
        any::<Option<[u8; 16]>>(),
    );
    (
        "[A-Za-z0-9_-][A-Za-z0-9_.-]{0,30}",
        any::<Option<[u8; 16]>>(),
        proptest::option::of(texts()),
        any::<Option<u64>>(),
        proptest::option::of("[a-z]{1,9}"),
        proptest::option::of(proptest::collection::btree_map(texts(), disk, 1..4)),
    )
        .prop_map(
            |(name, identity, description, created, parent, disks)| Descriptor {
                name,
                identity: identity.map(Identity),
                description,
                created,
                parent,
                disks: disks.map(|disks| disks.into_iter().map(described).collect()),
                domain: None,
                others: Vec::new(),
            },
        )
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(descriptor in descriptors()) {
        let xml = descriptor.to_xml();
        prop_assert_eq!(Descriptor::parse(&xml).unwrap(), descriptor, "{}", xml);
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "(<domaincheckpoint>)?[<>/a-z&;'\" ]{0,60}") {
        let _ = Descriptor::parse(&text);
    }
}

#[test]
fn a_description_by_libvirt_is_read() {
    let xml = "<?xml version='1.0'?>
        <domaincheckpoint>
          <name>1525889631</name>
          <parent><name>1525111885</name></parent>
          <creationTime>1525889631</creationTime>
          <description>Completion of updates &amp; more</description>
          <disks>
            <disk name='vda' checkpoint='bitmap' bitmap='1525889631' size='1048576'/>
            <disk name='vdb' checkpoint='no'/>
          </disks>
          <domain type='qemu'><name>fedora</name><uuid>93a5</uuid></domain>
        </domaincheckpoint>";
    let descriptor = Descriptor::parse(xml).unwrap();
    assert_eq!(descriptor.name, "1525889631");
    assert_eq!(descriptor.parent.as_deref(), Some("1525111885"));
    assert_eq!(descriptor.created, Some(1_525_889_631));
    assert_eq!(
        descriptor.description.as_deref(),
        Some("Completion of updates & more")
    );
    let disks = descriptor.disks.as_ref().unwrap();
    assert!(disks[0].bitmap && !disks[1].bitmap);
    assert!(
        descriptor
            .domain
            .as_ref()
            .unwrap()
            .starts_with("<domain type='qemu'>")
    );
    assert_eq!(Descriptor::parse(&descriptor.to_xml()).unwrap(), descriptor);
}

#[test]
fn descriptions_that_cannot_be_are_refused() {
    for bad in [
        "",
        "<domaincheckpoint>",
        "<domainsnapshot/>",
        "<domaincheckpoint><name>../x</name></domaincheckpoint>",
        "<domaincheckpoint><name>a</name><name>b</name></domaincheckpoint>",
        "<domaincheckpoint><creationTime>-1</creationTime></domaincheckpoint>",
        "<domaincheckpoint><disks/></domaincheckpoint>",
        "<domaincheckpoint><disks><disk/></disks></domaincheckpoint>",
        "<domaincheckpoint><disks><disk name='a' checkpoint='maybe'/></disks></domaincheckpoint>",
        "<domaincheckpoint><disks><disk name='a' checkpoint='no' bitmap='x'/></disks></domaincheckpoint>",
        "<domaincheckpoint><name>n</name><disks><disk name='a' bitmap='x'/></disks></domaincheckpoint>",
        "<domaincheckpoint><disks><disk name='a'/><disk name='a'/></disks></domaincheckpoint>",
        "<!DOCTYPE x [<!ENTITY a 'b'>]><domaincheckpoint>&a;</domaincheckpoint>",
    ] {
        assert!(Descriptor::parse(bad).is_err(), "{bad}");
    }
    let deep = "<a>".repeat(200_000);
    assert!(Descriptor::parse(&format!("<domaincheckpoint>{deep}")).is_err());
    let hidden = "<![CDATA[</]]><a>".repeat(200_000);
    assert!(Descriptor::parse(&format!("<domaincheckpoint>{hidden}")).is_err());
}

fn stored(directory: &tempfile::TempDir) -> DomainOptions {
    let definition = "<domain type='kvm'><graphics type='vnc' passwd='s3cret'/></domain>";
    DomainOptions {
        store: Some(Store::new(directory.path().join("store"))),
        definition: Some(definition.to_owned()),
        read_only: false,
    }
}

#[test]
fn a_missing_store_is_empty_and_reading_does_not_create_it() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(1);
    let domain = domain_with(&media, stored(&directory));
    assert!(domain.checkpoints(ListFlags::NONE).unwrap().is_empty());
    assert!(!directory.path().join("store").exists());
    create(&domain, "a");
    assert!(directory.path().join("store/a.xml").exists());
    assert_eq!(
        fs::read_dir(directory.path().join("store"))
            .unwrap()
            .count(),
        1
    );
}

#[test]
fn a_damaged_descriptor_is_named_and_hides_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(1);
    let domain = domain_with(&media, stored(&directory));
    create(&domain, "a");
    create(&domain, "b");
    let store = directory.path().join("store");
    fs::write(store.join("a.xml"), "<domaincheckpoint><name>a</na").unwrap();
    fs::write(store.join("zero.xml"), "").unwrap();
    fs::write(
        store.join("other.xml"),
        "<domaincheckpoint><name>b</name></domaincheckpoint>",
    )
    .unwrap();
    fs::write(store.join("binary.xml"), [0xff, 0xfe, 0, 1]).unwrap();
    fs::create_dir(store.join("folder.xml")).unwrap();
    fs::write(store.join(".hidden.xml"), "x").unwrap();
    let listing = domain.list(ListOptions::default()).unwrap();
    let shown: Vec<_> = listing
        .checkpoints
        .iter()
        .map(|info| (info.name.as_str(), info.metadata))
        .collect();
    assert_eq!(shown, [("a", false), ("b", true)]);
    let damaged = |problem: &&Problem| matches!(problem, Problem::DamagedDescriptor { .. });
    assert_eq!(listing.problems.iter().filter(damaged).count(), 5);
}

#[test]
fn metadata_only_deletions_leave_bitmaps_parents_and_current_alone() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(1);
    let domain = domain_with(&media, stored(&directory));
    for name in ["a", "b", "c"] {
        create(&domain, name);
    }
    domain.delete("b", DeleteFlags::METADATA_ONLY).unwrap();
    assert_eq!(
        names(&domain.checkpoints(ListFlags::NO_METADATA).unwrap()),
        ["b"]
    );
    let b = domain.lookup("b").unwrap();
    assert!(!b.has_metadata().unwrap());
    assert_eq!(
        domain
            .lookup("c")
            .unwrap()
            .parent()
            .unwrap()
            .unwrap()
            .name(),
        "b"
    );
    assert_eq!(domain.disks()[0].image.bitmaps().unwrap().len(), 3);
    let rest = DeleteFlags::METADATA_ONLY | DeleteFlags::CHILDREN;
    domain
        .delete("a", rest | DeleteFlags::CHILDREN_ONLY)
        .unwrap();
    assert_eq!(
        names(&domain.checkpoints(ListFlags::METADATA).unwrap()),
        ["a"]
    );
    domain.delete("a", rest).unwrap();
    assert!(domain.checkpoints(ListFlags::METADATA).unwrap().is_empty());
    assert_eq!(domain.current().unwrap().unwrap().name(), "c");
}

#[test]
fn a_lost_store_is_reinstated_from_exported_descriptions_parents_first() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(2);
    let domain = domain_with(&media, stored(&directory));
    let mut exported = Vec::new();
    for name in ["a", "b", "c"] {
        create(&domain, name);
    }
    for checkpoint in domain.checkpoints(ListFlags::TOPOLOGICAL).unwrap() {
        exported.push(checkpoint.xml(XmlFlags::SECURE).unwrap());
    }
    fs::remove_dir_all(directory.path().join("store")).unwrap();
    assert!(domain.checkpoints(ListFlags::METADATA).unwrap().is_empty());
    for xml in &exported {
        domain.create_xml(xml, CreateFlags::REDEFINE).unwrap();
    }
    assert_eq!(domain.checkpoints(ListFlags::METADATA).unwrap().len(), 3);
    assert_eq!(
        domain.current().unwrap().unwrap().name(),
        "c",
        "redefining does not change it"
    );
    assert_eq!(domain.verify().unwrap(), []);
}

#[test]
fn a_redefinition_is_validated_against_tree_and_bitmaps() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(1);
    let domain = domain_with(&media, stored(&directory));
    create(&domain, "a");
    create(&domain, "b");
    let redefine = |name: &str, parent: Option<&str>, flags| {
        let descriptor = Descriptor {
            name: name.to_owned(),
            created: Some(5),
            parent: parent.map(ToOwned::to_owned),
            disks: Some(vec![DescribedDisk {
                name: "vda".to_owned(),
                bitmap: true,
                ..DescribedDisk::default()
            }]),
            ..Descriptor::default()
        };
        domain.redefine(&descriptor, flags)
    };
    let none = CreateFlags::NONE;
    assert!(matches!(
        redefine("x", Some("x"), none),
        Err(Error::SelfParent(_))
    ));
    assert!(matches!(
        redefine("x", Some("nobody"), none),
        Err(Error::UnknownParent { .. })
    ));
    assert!(matches!(
        redefine("a", Some("b"), none),
        Err(Error::Cycle { .. })
    ));
    assert!(matches!(
        redefine("b", None, none),
        Err(Error::Disagrees { .. })
    ));
    let broken = redefine("x", Some("b"), none).unwrap_err();
    assert_eq!(broken.code(), ErrorCode::CheckpointInconsistent);
    redefine("x", Some("b"), CreateFlags::NO_VALIDATE).unwrap();
    let info = domain
        .lookup("x")
        .unwrap()
        .info(ListOptions::default())
        .unwrap();
    assert_eq!(info.parent.as_deref(), Some("b"));
    assert_eq!(info.disks[0].health, Health::Missing);
    redefine("b", Some("a"), none).unwrap();
    let empty = Descriptor {
        name: "y".to_owned(),
        ..Descriptor::default()
    };
    assert_eq!(
        domain.redefine(&empty, none).unwrap_err().code(),
        ErrorCode::XmlError
    );
    domain.delete("x", DeleteFlags::NONE).unwrap();
    assert_eq!(
        names(&domain.checkpoints(ListFlags::NONE).unwrap()),
        ["a", "b"]
    );
}

#[test]
fn create_flags_that_contradict_each_other_are_refused() {
    let media = media(1);
    let domain = common::domain(&media);
    let xml = "<domaincheckpoint><name>a</name></domaincheckpoint>";
    for flags in [
        CreateFlags::CURRENT,
        CreateFlags::NO_VALIDATE,
        CreateFlags::REDEFINE | CreateFlags::NO_METADATA,
    ] {
        assert_eq!(
            domain.create_xml(xml, flags).unwrap_err().code(),
            ErrorCode::InvalidArg
        );
    }
    let error = domain.create_xml(
        "<domaincheckpoint><name>a</name><creationTime>1</creationTime></domaincheckpoint>",
        CreateFlags::REDEFINE,
    );
    assert!(matches!(error, Err(Error::NoStore)));
    assert_eq!(
        domain.create_xml(xml, CreateFlags::NONE).unwrap().name(),
        "a"
    );
}

#[test]
fn no_metadata_leaves_no_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(1);
    let domain = domain_with(&media, stored(&directory));
    domain.create(&spec("a"), CreateFlags::NO_METADATA).unwrap();
    assert!(!domain.lookup("a").unwrap().has_metadata().unwrap());
    assert!(!directory.path().join("store").exists());
}

#[test]
fn a_description_tells_what_the_flags_ask_and_no_secret() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(2);
    let domain = domain_with(&media, stored(&directory));
    let described = CreateSpec {
        description: Some("a < b".to_owned()),
        ..spec("a")
    };
    let a = domain.create(&described, CreateFlags::NONE).unwrap();
    common::write(&domain, "vda", 0, 4096, 1);
    let xml = a.xml(XmlFlags::SIZE).unwrap();
    assert!(xml.contains("<description>a &lt; b</description>"), "{xml}");
    assert!(xml.contains("size="), "{xml}");
    assert!(
        xml.contains("<domain type='kvm'>") && !xml.contains("s3cret"),
        "{xml}"
    );
    assert!(a.xml(XmlFlags::SECURE).unwrap().contains("s3cret"));
    assert!(!a.xml(XmlFlags::NO_DOMAIN).unwrap().contains("<domain "));
    assert!(!a.xml(XmlFlags::LIBVIRT).unwrap().contains("tidemark"));
    for flags in [XmlFlags::INACTIVE, XmlFlags::UPDATE_CPU] {
        assert_eq!(a.xml(flags).unwrap_err().code(), ErrorCode::InvalidArg);
    }
    let disks: Vec<Disk> = domain.disks().to_vec();
    let read_only = DomainOptions {
        read_only: true,
        ..stored(&directory)
    };
    let handle = Domain::new(disks, read_only).unwrap().lookup("a").unwrap();
    assert_eq!(
        handle.xml(XmlFlags::SECURE).unwrap_err().code(),
        ErrorCode::OperationDenied
    );
    assert!(handle.xml(XmlFlags::NONE).is_ok());
    assert!(handle.delete(DeleteFlags::NONE).is_err());
}

#[test]
fn a_descriptor_of_an_earlier_checkpoint_of_that_name_is_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(1);
    let domain = domain_with(&media, stored(&directory));
    create(&domain, "a");
    let old = fs::read_to_string(directory.path().join("store/a.xml")).unwrap();
    domain.delete("a", DeleteFlags::NONE).unwrap();
    create(&domain, "a");
    fs::write(directory.path().join("store/a.xml"), &old).unwrap();
    let problems = domain.verify().unwrap();
    let is_other = |problem: &Problem| matches!(problem, Problem::DescriptorOfAnother { .. });
    assert!(problems.iter().any(is_other), "{problems:?}");
    assert!(!domain.lookup("a").unwrap().has_metadata().unwrap());
    let again = domain.create_xml(&old, CreateFlags::REDEFINE).unwrap_err();
    assert_eq!(again.code(), ErrorCode::CheckpointInconsistent);
}

#[test]
fn a_disk_that_holds_another_image_is_full_alone() {
    let directory = tempfile::tempdir().unwrap();
    let media = media(2);
    let domain = domain_with(&media, stored(&directory));
    create(&domain, "a");
    close(domain);
    let swapped = [media[1].clone(), media[0].clone()];
    let domain = domain_with(&swapped, stored(&directory));
    let reason = common::since(&domain, "a", "vda").unwrap_err();
    assert_eq!(reason, tidemark_checkpoint::FullReason::OtherImage);
    let problems = domain.verify().unwrap();
    let is_other = |problem: &Problem| matches!(problem, Problem::OtherImage { .. });
    assert!(problems.iter().any(is_other), "{problems:?}");
}
