//! From XML to [`Descriptor`].

use roxmltree::{Document, Node, ParsingOptions};
use tidemark_qcow2::chain::{Identity, ImageUuid};

use super::MAX_DESCRIPTOR_BYTES;
use super::depth::depth;
use super::descriptor::{DescribedDisk, Descriptor, NAMESPACE};
use crate::{Error, Result, name};

/// Elements and texts in one descriptor.
const MAX_NODES: u32 = 1 << 20;
/// Nesting of elements; a parser that recurses must not meet more.
const MAX_DEPTH: usize = 256;
/// What libvirt's format has at the top.
const THEIRS: [&str; 6] = [
    "name",
    "description",
    "creationTime",
    "parent",
    "disks",
    "domain",
];
/// What we have there.
const OURS: [&str; 2] = ["identity", "image"];

impl Descriptor {
    /// Reads a `<domaincheckpoint>`, ours or libvirt's. Elements that are neither's are kept as
    /// they are.
    ///
    /// # Errors
    /// [`Error::Xml`] when it is not well-formed, a value is impossible, it is larger than 16 MiB,
    /// or its elements nest deeper than 256; [`Error::BadName`].
    pub fn parse(xml: &str) -> Result<Self> {
        if xml.len() > MAX_DESCRIPTOR_BYTES {
            return Err(Error::Xml("larger than 16 MiB".to_owned()));
        }
        if depth(xml) > MAX_DEPTH {
            return Err(Error::Xml(format!("elements nest deeper than {MAX_DEPTH}")));
        }
        let options = ParsingOptions {
            nodes_limit: MAX_NODES,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(xml, options)
            .map_err(|error| Error::Xml(error.to_string()))?;
        let root = document.root_element();
        if root.tag_name().name() != "domaincheckpoint" {
            return Err(Error::Xml(format!(
                "root element is <{}>",
                root.tag_name().name()
            )));
        }
        let name = text(root, "name")?.unwrap_or_default();
        if !name.is_empty() {
            name::check(&name)?;
        }
        let parent = match child(root, "parent")? {
            Some(parent) => text(parent, "name")?,
            None => None,
        };
        let mut disks = read_disks(root, &name)?;
        read_images(root, disks.as_deref_mut().unwrap_or_default())?;
        Ok(Self {
            identity: read_identity(root)?,
            description: text(root, "description")?,
            created: number(text(root, "creationTime")?, "creationTime")?,
            parent,
            disks,
            domain: child(root, "domain")?.map(|domain| alone(xml, domain)),
            others: root
                .children()
                .filter(|node| is_of_others(*node))
                .map(|node| alone(xml, node))
                .collect(),
            name,
        })
    }
}

/// An element as a document of its own: with the namespaces that it used and did not declare.
fn alone(xml: &str, node: Node<'_, '_>) -> String {
    let text = &xml[node.range()];
    if Document::parse(text).is_ok() {
        return text.to_owned();
    }
    let declared = node.namespaces().filter_map(|namespace| {
        let prefix = namespace.name()?;
        let uri = super::write::Escaped(namespace.uri());
        let missing = prefix != "xml" && !text.contains(&format!("xmlns:{prefix}="));
        missing.then(|| format!(" xmlns:{prefix}='{uri}'"))
    });
    let declared: String = declared.collect();
    // Behind the tag's name, which ends at the first of these.
    let name_end = text.find([' ', '\t', '\r', '\n', '/', '>']);
    let (head, rest) = text.split_at(name_end.unwrap_or(text.len()));
    format!("{head}{declared}{rest}")
}

fn is_of_others(node: Node<'_, '_>) -> bool {
    let theirs = THEIRS.iter().any(|tag| is_plain(node, tag));
    let ours = OURS.iter().any(|tag| is_ours(node, tag));
    node.is_element() && !theirs && !ours
}

fn child<'a, 'i>(parent: Node<'a, 'i>, tag: &'static str) -> Result<Option<Node<'a, 'i>>> {
    let mut found = parent.children().filter(|node| is_plain(*node, tag));
    let first = found.next();
    if found.next().is_some() {
        return Err(Error::Xml(format!("<{tag}> stands twice")));
    }
    Ok(first)
}

fn is_plain(node: Node<'_, '_>, tag: &str) -> bool {
    node.is_element() && node.tag_name().name() == tag && node.tag_name().namespace().is_none()
}

fn is_ours(node: Node<'_, '_>, tag: &str) -> bool {
    node.is_element() && node.has_tag_name((NAMESPACE, tag))
}

fn text(parent: Node<'_, '_>, tag: &'static str) -> Result<Option<String>> {
    Ok(child(parent, tag)?.map(content))
}

fn content(node: Node<'_, '_>) -> String {
    node.children()
        .filter(|child| child.is_text())
        .filter_map(|child| child.text())
        .collect()
}

fn number(text: Option<String>, what: &'static str) -> Result<Option<u64>> {
    let parse = |text: String| {
        text.trim()
            .parse()
            .map_err(|_| Error::Xml(format!("{what} is {text:?}, not a number")))
    };
    text.map(parse).transpose()
}

fn read_identity(root: Node<'_, '_>) -> Result<Option<Identity>> {
    let Some(node) = root.children().find(|node| is_ours(*node, "identity")) else {
        return Ok(None);
    };
    let digits = content(node);
    match Identity::from_hex(digits.trim()) {
        Some(identity) => Ok(Some(identity)),
        None => Err(Error::Xml(format!(
            "identity {digits:?} is not 32 hexadecimal digits"
        ))),
    }
}

fn read_disks(root: Node<'_, '_>, checkpoint: &str) -> Result<Option<Vec<DescribedDisk>>> {
    let Some(list) = child(root, "disks")? else {
        return Ok(None);
    };
    let mut disks: Vec<DescribedDisk> = Vec::new();
    for node in list.children().filter(|node| is_plain(*node, "disk")) {
        let disk = read_disk(node, checkpoint)?;
        if disks.iter().any(|other| other.name == disk.name) {
            return Err(Error::DoubledDisk(disk.name));
        }
        disks.push(disk);
    }
    if disks.is_empty() {
        return Err(Error::Xml("<disks> names no disk".to_owned()));
    }
    Ok(Some(disks))
}

fn read_disk(node: Node<'_, '_>, checkpoint: &str) -> Result<DescribedDisk> {
    let Some(name) = node.attribute("name").filter(|name| !name.is_empty()) else {
        return Err(Error::Xml("a <disk> has no name".to_owned()));
    };
    let bitmap = match node.attribute("checkpoint") {
        None | Some("bitmap") => true,
        Some("no") => false,
        Some(other) => return Err(Error::Xml(format!("disk '{name}': checkpoint='{other}'"))),
    };
    match node.attribute("bitmap") {
        Some(_) if !bitmap => {
            return Err(Error::Xml(format!(
                "disk '{name}' names a bitmap and takes no part"
            )));
        }
        Some(other) if other != checkpoint => {
            let wanted = "the bitmap's name must be the checkpoint's";
            return Err(Error::Xml(format!(
                "disk '{name}': bitmap='{other}': {wanted}"
            )));
        }
        _ => {}
    }
    let changed_bytes = number(node.attribute("size").map(ToOwned::to_owned), "size")?;
    Ok(DescribedDisk {
        name: name.to_owned(),
        bitmap,
        changed_bytes,
        image: None,
    })
}

fn read_images(root: Node<'_, '_>, disks: &mut [DescribedDisk]) -> Result<()> {
    for node in root.children().filter(|node| is_ours(*node, "image")) {
        let digits = content(node);
        let Some(uuid) = ImageUuid::from_hex(digits.trim()) else {
            return Err(Error::Xml(format!(
                "image {digits:?} is not 32 hexadecimal digits"
            )));
        };
        let name = node.attribute("disk").unwrap_or_default();
        if let Some(disk) = disks.iter_mut().find(|disk| disk.name == name) {
            disk.image = Some(uuid);
        }
    }
    Ok(())
}
