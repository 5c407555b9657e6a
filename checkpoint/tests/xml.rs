//! `domaincheckpoint` in and out: judged by libvirt's own schema, its own vectors, and its own
//! reader.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{create, domain_with, media, names, spec, write};
use tidemark_checkpoint::{
    Checkpoint, CreateFlags, CreateSpec, DescribedDisk, Descriptor, Domain, DomainOptions,
    ErrorCode, ListFlags, Store, XmlFlags,
};
use tidemark_fixtures::oracle::virsh;
use tidemark_fixtures::random::Random;

const SCHEMA: &str = "domaincheckpoint.rng";

/// A definition that libvirt's schema accepts, with a secret of every kind that it marks as one.
const DEFINITION: &str =
    "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
    <name>fedora</name>
    <uuid>93a5c045-6457-2c09-e56c-927cdf34e178</uuid>
    <memory unit='KiB'>1048576</memory>
    <vcpu>1</vcpu>
    <os><type arch='x86_64' machine='pc'>hvm</type></os>
    <devices>
      <disk type='network' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source protocol='https' name='a.qcow2'>
          <host name='example.org' port='443'/>
          <cookies><cookie name='session'>s3cret-cookie</cookie></cookies>
        </source>
        <target dev='vda' bus='virtio'/>
      </disk>
      <graphics type='vnc' port='-1' autoport='yes' passwd='s3cret-vnc'/>
      <graphics type='spice' autoport='yes' passwd='s3cret-spice'/>
    </devices>
    <qemu:commandline><qemu:arg value='-foo'/></qemu:commandline>
  </domain>";

fn assert_valid(documents: &[String]) {
    if let Err(problem) = virsh::validate(SCHEMA, documents) {
        panic!("{problem}");
    }
}

/// Everything that we write for libvirt is valid by its schema, whatever is in it.
#[test]
fn what_is_written_for_libvirt_is_valid_by_its_schema() {
    if !virsh::available() {
        return;
    }
    let mut documents = Vec::new();
    for seed in 0..common::cases(60) {
        let mut random = Random::new(seed);
        let mut maybe = || random.one_in(2);
        let text = [
            "",
            "plain",
            "a < b & c > 'd' \"e\"\t\n\r",
            "\u{1f600} \u{e9} ]]>",
            "\u{1}\u{b}",
        ];
        let disks: Vec<DescribedDisk> = ["vda", "sdb", "/images/c.qcow2"]
            .into_iter()
            .map(|name| DescribedDisk {
                name: name.to_owned(),
                bitmap: maybe(),
                changed_bytes: maybe().then_some(1 << 40),
                image: maybe().then_some(tidemark_qcow2::chain::ImageUuid([7; 16])),
            })
            .collect();
        let descriptor = Descriptor {
            name: if maybe() {
                "a-1_b.c".to_owned()
            } else {
                String::new()
            },
            identity: maybe().then_some(tidemark_qcow2::chain::Identity([9; 16])),
            description: maybe().then(|| text[usize::try_from(seed).unwrap() % 5].to_owned()),
            created: maybe().then_some(1_525_889_631),
            parent: maybe().then(|| "parent".to_owned()),
            disks: maybe().then_some(disks),
            domain: maybe().then(|| DEFINITION.to_owned()),
            others: vec!["<x:y xmlns:x='urn:x'/>".to_owned()],
        };
        for more in [
            XmlFlags::NONE,
            XmlFlags::SECURE,
            XmlFlags::NO_DOMAIN,
            XmlFlags::SIZE,
        ] {
            documents.push(descriptor.render(XmlFlags::LIBVIRT | more));
        }
        let again = Descriptor::parse(&descriptor.to_xml()).unwrap();
        assert_eq!(again.others, descriptor.others);
    }
    assert_valid(&documents);
    println!("{} documents", documents.len());
    assert!(documents.len() >= 200);
}

fn world(folder: &tempfile::TempDir, disks: usize) -> Domain {
    let options = DomainOptions {
        store: Some(Store::new(folder.path().join("store"))),
        definition: Some(DEFINITION.to_owned()),
        read_only: false,
    };
    domain_with(&media(disks), options)
}

/// The inputs of libvirt's xml2xml tests, by what they are about. Times are ours where libvirt's
/// test fixes them.
#[test]
fn libvirts_round_trip_vectors_hold() {
    let size_of = |checkpoint: &Checkpoint| {
        checkpoint
            .xml(XmlFlags::LIBVIRT | XmlFlags::NO_DOMAIN | XmlFlags::SIZE)
            .unwrap()
    };
    let made = |inner: &str| {
        let folder = tempfile::tempdir().unwrap();
        let domain = world(&folder, 2);
        let xml = format!("<domaincheckpoint>{inner}</domaincheckpoint>");
        let checkpoint = domain.create_xml(&xml, CreateFlags::NONE)?;
        let text = size_of(&checkpoint);
        let read = Descriptor::parse(&text).unwrap();
        Ok::<_, tidemark_checkpoint::Error>((read, text))
    };
    let parts = |read: &Descriptor| -> Vec<(String, bool)> {
        read.disks
            .iter()
            .flatten()
            .map(|disk| (disk.name.clone(), disk.bitmap))
            .collect()
    };
    let both = |a, b| vec![("vda".to_owned(), a), ("vdb".to_owned(), b)];
    // empty: everything by default, the name from the clock.
    let (read, _) = made("").unwrap();
    assert_eq!(read.name, read.created.unwrap().to_string());
    assert_eq!(parts(&read), both(true, true));
    // sample: a name, a description, one disk in and one out.
    let (read, text) = made(
        "<name>1525889631</name><description>Completion of updates after OS install</description>\
         <disks><disk name='vda' checkpoint='bitmap'/><disk name='vdb' checkpoint='no'/></disks>",
    )
    .unwrap();
    assert_eq!(
        read.description.as_deref(),
        Some("Completion of updates after OS install")
    );
    assert_eq!(parts(&read), both(true, false));
    assert!(text.contains("bitmap='1525889631'"), "{text}");
    // disk-default: checkpoint='bitmap' need not be said; disks not listed take no part.
    let (read, _) = made("<disks><disk name='vdb'/></disks>").unwrap();
    assert_eq!(parts(&read), both(false, true));
    // size: ignored on the way in, told on the way out.
    let (read, text) = made("<disks><disk name='vda' size='1048576'/></disks>").unwrap();
    let size = read.disks.unwrap()[0].changed_bytes.unwrap();
    assert!(size < 1_048_576, "{text}");
    // A parent and a time in a description to create from are ignored.
    let (read, _) =
        made("<parent><name>nobody</name></parent><creationTime>5</creationTime>").unwrap();
    assert!(read.parent.is_none() && read.created != Some(5));
    // disk-invalid, name-invalid.
    for (inner, code) in [
        (
            "<disks><disk name='vda' checkpoint='no' bitmap='x'/></disks>",
            ErrorCode::XmlError,
        ),
        ("<name>../escape</name>", ErrorCode::XmlError),
        ("<name>a\nb</name>", ErrorCode::XmlError),
        (
            "<disks><disk name='vdx'/></disks>",
            ErrorCode::ConfigUnsupported,
        ),
    ] {
        assert_eq!(made(inner).unwrap_err().code(), code, "{inner}");
    }
    // redefine: comes back word for word.
    let folder = tempfile::tempdir().unwrap();
    let domain = world(&folder, 1);
    let redefine = "<domaincheckpoint>\n  <name>1525889631</name>\n  \
         <description>Completion of updates after OS install</description>\n  \
         <creationTime>1525889631</creationTime>\n  <disks>\n    \
         <disk name='vda' checkpoint='bitmap' bitmap='1525889631'/>\n    \
         <disk name='vdb' checkpoint='no'/>\n  </disks>\n</domaincheckpoint>\n";
    let flags = CreateFlags::REDEFINE | CreateFlags::NO_VALIDATE;
    let again = domain.create_xml(redefine, flags).unwrap();
    let libvirt = XmlFlags::LIBVIRT | XmlFlags::NO_DOMAIN | XmlFlags::SIZE;
    assert_eq!(again.xml(libvirt).unwrap(), redefine);
    println!("10 vectors");
}

/// Without SECURE nothing that libvirt's own output would leave out is told, in any way out.
#[test]
fn no_secret_leaves_without_secure() {
    let folder = tempfile::tempdir().unwrap();
    let domain = world(&folder, 1);
    let a = create(&domain, "a");
    for more in [XmlFlags::NONE, XmlFlags::SIZE, XmlFlags::LIBVIRT] {
        let plain = a.xml(more).unwrap();
        assert!(!plain.contains("s3cret"), "{plain}");
        assert!(plain.contains("qemu:arg"), "the rest stays: {plain}");
        let all = a.xml(more | XmlFlags::SECURE).unwrap();
        for secret in ["s3cret-cookie", "s3cret-vnc", "s3cret-spice"] {
            assert!(all.contains(secret), "{all}");
        }
        if virsh::available() && more.contains(XmlFlags::LIBVIRT) {
            assert_valid(&[plain, all]);
        }
    }
    // What nobody here understands may hold anything.
    let store = folder.path().join("store/a.xml");
    let text = std::fs::read_to_string(&store).unwrap();
    let more = "<other xmlns='urn:other' passwd='s3cret-other'/></domaincheckpoint>";
    std::fs::write(&store, text.replace("</domaincheckpoint>", more)).unwrap();
    assert!(!a.xml(XmlFlags::NONE).unwrap().contains("s3cret"));
    assert!(a.xml(XmlFlags::SECURE).unwrap().contains("s3cret-other"));
    println!("8 documents");
}

#[test]
fn a_definition_keeps_the_namespaces_it_found_outside() {
    let xml = "<domaincheckpoint xmlns:q='urn:q' xmlns:r='urn:r'><name>a</name>\
               <domain type='kvm'><q:x r:y='1'/></domain><r:z/></domaincheckpoint>";
    let descriptor = Descriptor::parse(xml).unwrap();
    let again = Descriptor::parse(&descriptor.to_xml()).unwrap();
    assert_eq!(again, descriptor);
    assert!(descriptor.domain.unwrap().contains("xmlns:q='urn:q'"));
    assert!(descriptor.others[0].contains("xmlns:r='urn:r'"));
}

#[test]
fn limits_on_size_and_depth_cannot_be_talked_around() {
    let wrapped =
        |inner: &str| format!("<domaincheckpoint><name>a</name>{inner}</domaincheckpoint>");
    let nested = |open: &str, close: &str, depth: usize| {
        wrapped(&format!("{}{}", open.repeat(depth), close.repeat(depth)))
    };
    let at_most = nested("<b>", "</b>", 255);
    assert!(Descriptor::parse(&at_most).is_ok());
    let refused = [
        nested("<b>", "</b>", 256),
        nested("<b c='/>'>", "</b>", 300),
        nested("<b c=\"</b>\">", "</b>", 100_000),
        nested("<b><!-- </b> -->", "</b>", 100_000),
        nested("<b><?x </b>?>", "</b>", 300),
        nested("<b><![CDATA[</b>]]>", "</b>", 300),
        wrapped(&"<b/>".repeat(2 << 20)),
        wrapped(&format!(
            "<description>{}</description>",
            "x".repeat(16 << 20)
        )),
        "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;'>]>\
         <domaincheckpoint><name>&b;</name></domaincheckpoint>"
            .to_owned(),
    ];
    for xml in &refused {
        let error = Descriptor::parse(xml).unwrap_err();
        assert_eq!(error.code(), ErrorCode::XmlError, "{error}");
    }
    println!("{} refused", refused.len());
}

/// SIZE is the estimate of the next increment, and absent where the next backup is full.
#[test]
fn sizes_are_told_where_they_are_known() {
    let folder = tempfile::tempdir().unwrap();
    let domain = world(&folder, 2);
    create(&domain, "a");
    write(&domain, "vda", 0, 100_000, 1);
    create(&domain, "b");
    write(&domain, "vda", 500_000, 9000, 1);
    let sizes = |name: &str| {
        let xml = domain.lookup(name).unwrap().xml(XmlFlags::SIZE).unwrap();
        let disks = Descriptor::parse(&xml).unwrap().disks.unwrap();
        disks
            .iter()
            .map(|disk| disk.changed_bytes)
            .collect::<Vec<_>>()
    };
    let bytes = |disk: usize, name: &str| {
        let changes = domain.changed_since(name, Default::default()).unwrap();
        match &changes[disk].delta {
            tidemark_checkpoint::DiskDelta::Incremental(bits) => bits.dirty_bytes(),
            tidemark_checkpoint::DiskDelta::Full { reason } => panic!("{reason}"),
        }
    };
    for name in ["a", "b"] {
        assert_eq!(sizes(name), [Some(bytes(0, name)), Some(bytes(1, name))]);
    }
    assert!(bytes(0, "a") >= 108_000 && bytes(0, "b") >= 9000 && bytes(0, "b") < 200_000);
    let image = &domain.disk("vda").unwrap().image;
    image.update(|update| update.remove("a")).unwrap();
    assert_eq!(sizes("a")[0], None, "no estimate of what has to be full");
    assert_eq!(sizes("b")[0], Some(bytes(0, "b")));
    let plain = domain.lookup("b").unwrap().xml(XmlFlags::NONE).unwrap();
    assert!(!plain.contains("size="));
}

/// A whole chain goes to libvirt parents first, and what libvirt then says of each is what we do.
#[test]
fn libvirt_tells_of_an_exported_chain_what_we_told() {
    if !virsh::available() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let domain = world(&folder, 1);
    for number in 0..40 {
        let described = CreateSpec {
            description: (number % 3 == 0).then(|| format!("number {number} & <more>")),
            ..spec(&format!("{}", number * 7 % 40))
        };
        domain.create(&described, CreateFlags::NONE).unwrap();
        if number % 9 == 8 {
            domain
                .set_current(&format!("{}", number / 2 * 7 % 40))
                .unwrap();
        }
    }
    let flags = XmlFlags::LIBVIRT | XmlFlags::NO_DOMAIN;
    let all = domain.checkpoints(ListFlags::TOPOLOGICAL).unwrap();
    let (mut lines, mut documents) = (Vec::new(), Vec::new());
    for checkpoint in &all {
        let xml = checkpoint.xml(flags).unwrap();
        documents.push(xml.clone());
        let path = folder.path().join(checkpoint.name());
        std::fs::write(&path, xml).unwrap();
        lines.push(format!(
            "checkpoint-create test --xmlfile {} --redefine",
            path.display()
        ));
    }
    let dumps = all
        .iter()
        .map(|checkpoint| format!("checkpoint-dumpxml test {} --no-domain", checkpoint.name()));
    lines.extend(dumps);
    let session = virsh::session(&lines);
    assert_eq!(session.errors, Vec::<String>::new());
    for (checkpoint, answer) in all.iter().zip(&session.answers[all.len()..]) {
        let theirs = Descriptor::parse(answer).unwrap();
        let ours = Descriptor::parse(&checkpoint.xml(flags).unwrap()).unwrap();
        assert_eq!(theirs, ours);
    }
    assert_eq!(names(&all).len(), 40);
    println!("{} checkpoints", all.len());
}
