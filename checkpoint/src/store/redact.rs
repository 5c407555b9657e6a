//! A domain's definition without its secrets.

use roxmltree::{Document, ParsingOptions};

/// Attributes that hold a secret in libvirt's domain format.
const SECRET_ATTRIBUTES: [&str; 2] = ["passwd", "password"];

/// `definition` without the attributes that hold secrets; empty when it cannot be read, for then
/// nobody knows what is in it.
pub(super) fn redacted(definition: &str) -> String {
    let options = ParsingOptions::default();
    let Ok(document) = Document::parse_with_options(definition, options) else {
        return String::new();
    };
    let mut secrets: Vec<_> = document
        .descendants()
        .flat_map(|node| node.attributes())
        .filter(|attribute| SECRET_ATTRIBUTES.contains(&attribute.name()))
        .map(|attribute| attribute.range())
        .collect();
    secrets.sort_by_key(|range| range.start);
    let mut out = String::with_capacity(definition.len());
    let mut at = 0;
    for secret in secrets {
        out.push_str(definition[at..secret.start].trim_end());
        at = secret.end;
    }
    out.push_str(&definition[at..]);
    out
}

#[cfg(test)]
mod tests {
    use super::redacted;

    #[test]
    fn passwords_leave_and_the_rest_stays() {
        let definition = "<domain><graphics type='vnc' passwd='a&lt;b' port='1'/></domain>";
        let clean = "<domain><graphics type='vnc' port='1'/></domain>";
        assert_eq!(redacted(definition), clean);
        assert_eq!(redacted(clean), clean);
        assert_eq!(redacted("<domain"), "");
    }
}
