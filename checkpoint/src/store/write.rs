//! From [`Descriptor`] to XML.

use std::fmt::{self, Display, Write};

use super::descriptor::{Descriptor, NAMESPACE};
use super::redact::redacted;
use crate::XmlFlags;

/// How a descriptor is stored: whole.
const STORED: XmlFlags = XmlFlags::SECURE;

impl Descriptor {
    /// The descriptor as it is stored, with everything it knows.
    pub fn to_xml(&self) -> String {
        self.render(STORED | XmlFlags::SIZE)
    }

    /// The descriptor as `flags` ask. Sizes appear where they are filled in and
    /// [`XmlFlags::SIZE`] is set.
    pub fn render(&self, flags: XmlFlags) -> String {
        let mut out = String::new();
        // Writing into a string cannot fail.
        let _ = self.write(&mut out, flags);
        out
    }

    fn write(&self, out: &mut String, flags: XmlFlags) -> fmt::Result {
        let ours = !flags.contains(XmlFlags::LIBVIRT);
        let has_ours =
            self.identity.is_some() || self.disks.iter().flatten().any(|disk| disk.image.is_some());
        match ours && has_ours {
            true => writeln!(out, "<domaincheckpoint xmlns:tidemark='{NAMESPACE}'>")?,
            false => writeln!(out, "<domaincheckpoint>")?,
        }
        if !self.name.is_empty() {
            writeln!(out, "  <name>{}</name>", Escaped(&self.name))?;
        }
        if let Some(description) = &self.description {
            writeln!(out, "  <description>{}</description>", Escaped(description))?;
        }
        if let Some(parent) = &self.parent {
            writeln!(
                out,
                "  <parent>\n    <name>{}</name>\n  </parent>",
                Escaped(parent)
            )?;
        }
        if let Some(created) = self.created {
            writeln!(out, "  <creationTime>{created}</creationTime>")?;
        }
        self.write_disks(out, flags.contains(XmlFlags::SIZE))?;
        if let Some(domain) = self
            .domain
            .as_ref()
            .filter(|_| !flags.contains(XmlFlags::NO_DOMAIN))
        {
            match flags.contains(XmlFlags::SECURE) {
                true => writeln!(out, "  {domain}")?,
                false => writeln!(out, "  {}", redacted(domain))?,
            }
        }
        if ours {
            self.write_ours(out)?;
        }
        let others = self.others.iter();
        for other in others.filter(|_| ours && flags.contains(XmlFlags::SECURE)) {
            writeln!(out, "  {other}")?;
        }
        writeln!(out, "</domaincheckpoint>")
    }

    fn write_disks(&self, out: &mut String, sizes: bool) -> fmt::Result {
        let Some(disks) = self.disks.as_ref().filter(|disks| !disks.is_empty()) else {
            return Ok(());
        };
        writeln!(out, "  <disks>")?;
        for disk in disks {
            write!(out, "    <disk name='{}'", Escaped(&disk.name))?;
            match disk.bitmap {
                true => write!(out, " checkpoint='bitmap' bitmap='{}'", Escaped(&self.name))?,
                false => write!(out, " checkpoint='no'")?,
            }
            if let Some(size) = disk.changed_bytes.filter(|_| sizes && disk.bitmap) {
                write!(out, " size='{size}'")?;
            }
            writeln!(out, "/>")?;
        }
        writeln!(out, "  </disks>")
    }

    fn write_ours(&self, out: &mut String) -> fmt::Result {
        if let Some(identity) = self.identity {
            writeln!(out, "  <tidemark:identity>{identity}</tidemark:identity>")?;
        }
        for disk in self.disks.iter().flatten() {
            if let Some(image) = disk.image {
                let name = Escaped(&disk.name);
                writeln!(
                    out,
                    "  <tidemark:image disk='{name}'>{image}</tidemark:image>"
                )?;
            }
        }
        Ok(())
    }
}

/// Text that is safe in an element and in a quoted attribute. What XML 1.0 cannot express at all
/// (most control characters) becomes U+FFFD.
pub(super) struct Escaped<'a>(pub(super) &'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '&' => out.write_str("&amp;")?,
                '<' => out.write_str("&lt;")?,
                '>' => out.write_str("&gt;")?,
                '"' => out.write_str("&quot;")?,
                '\'' => out.write_str("&apos;")?,
                // A literal carriage return or tab would be normalized away by the reader.
                '\t' | '\n' | '\r' => write!(out, "&#{};", u32::from(character))?,
                '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => out.write_char('\u{fffd}')?,
                _ => out.write_char(character)?,
            }
        }
        Ok(())
    }
}
