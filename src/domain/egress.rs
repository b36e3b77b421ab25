//! Which addresses the worker may connect to: those of the public Internet, and what the administrator opens beyond.
//!
//! The address is judged that is connected to, not the name in the URL: a name may resolve to anything.

use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

const CGNAT: &str = "a carrier-grade NAT address";
const DOCUMENTATION: &str = "a documentation address";
const LINK_LOCAL: &str = "a link-local address";
const LOOPBACK: &str = "a loopback address";
const METADATA: &str = "a cloud metadata address";
const MULTICAST: &str = "a multicast address";
const PRIVATE: &str = "a private address";
const RESERVED: &str = "a reserved address";
const UNSPECIFIED: &str = "an unspecified address";

/// What an entry looks like, for those who wrote another.
const EXAMPLES: &str = "example.com, *.example.com:443, 10.0.0.0/8, 127.0.0.1:8000-8999 or [fd00::/8]:443";

/// What `nexus_hub.egress_allow` opens beyond the public Internet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy(Vec<Entry>);

/// A target, at some ports or at all.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    target: Target,
    ports: Option<RangeInclusive<u16>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    /// A host of that name, whatever its address.
    Name(String),
    /// A host of any name below that one.
    Below(String),
    /// An address in that network, whatever the name. An IPv4 network also holds the IPv6 addresses that carry one of
    /// its own; an IPv6 network holds no address that is written in IPv4.
    Network(IpNet),
}

impl Policy {
    /// Reads a list separated by commas or white space. An entry is a host, `*.` and a domain, an address or a CIDR,
    /// with a port or a range of ports if need be. The problem, if there is one, names the entry.
    pub fn parse(text: &str) -> Result<Self, String> {
        let entries = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|entry| !entry.is_empty());
        let read = |entry: &str| {
            Entry::parse(entry).map_err(|problem| {
                let shown: String = entry.chars().take(80).collect();
                format!("cannot read \"{shown}\": {problem}; an entry looks like {EXAMPLES}")
            })
        };
        entries.map(read).collect::<Result<_, _>>().map(Self)
    }

    /// Why a connection to `address` is refused; `None` when it is allowed. `host` is the URL's, a name or the address
    /// itself. Where the `port` is not known, only entries without ports count.
    pub fn refusal(&self, host: &str, port: Option<u16>, address: IpAddr) -> Option<&'static str> {
        let kind = kind(address)?;
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        (!self.0.iter().any(|entry| entry.opens(&host, port, address))).then_some(kind)
    }
}

impl Entry {
    fn parse(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            return Err("write it without the scheme".into());
        }
        if let Some(rest) = text.strip_prefix('[') {
            let (inside, after) = rest.split_once(']').ok_or("the closing bracket is missing")?;
            let target = network(inside)?;
            if target.addr().is_ipv4() {
                return Err("brackets are for IPv6".into());
            }
            let ports = match after.strip_prefix(':') {
                Some(text) => Some(ports(text)?),
                None if after.is_empty() => None,
                None => return Err("only a port can follow the bracket, a prefix length stands inside".into()),
            };
            return Ok(Self { target: Target::Network(target), ports });
        }
        // More than one colon is IPv6, whose ports can only be told from it by brackets.
        match text.split_once(':') {
            Some((_, rest)) if rest.contains(':') => Ok(Self { target: Target::Network(network(text)?), ports: None }),
            Some((target, text)) => Ok(Self { target: Target::parse(target)?, ports: Some(ports(text)?) }),
            None => Ok(Self { target: Target::parse(text)?, ports: None }),
        }
    }

    /// Whether this opens a host, whose name is in lower case and without a final dot.
    fn opens(&self, host: &str, port: Option<u16>, address: IpAddr) -> bool {
        let at_port = self.ports.as_ref().is_none_or(|ports| port.is_some_and(|port| ports.contains(&port)));
        at_port
            && match &self.target {
                Target::Name(name) => host == name,
                Target::Below(name) => host
                    .strip_suffix(name.as_str())
                    .and_then(|below| below.strip_suffix('.'))
                    .is_some_and(|below| !below.is_empty()),
                Target::Network(network) => {
                    network.contains(&address) || carried(address).is_some_and(|v4| network.contains(&IpAddr::V4(v4)))
                }
            }
    }
}

impl Target {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Err("to open every address, write 0.0.0.0/0 and ::/0".into());
        }
        if let Some(parent) = text.strip_prefix("*.") {
            return Ok(Self::Below(name(parent)?));
        }
        if text.contains('/') || text.parse::<Ipv4Addr>().is_ok() {
            return Ok(Self::Network(network(text)?));
        }
        Ok(Self::Name(name(text)?))
    }
}

/// Reads a host name (RFC 1123, 2.1, but with the underscores that Docker and Windows have in theirs) into lower case.
fn name(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if name.is_empty() {
        return Err("the host is missing".into());
    }
    if !name.is_ascii() {
        return Err("write an international name in its ASCII form, which has xn-- in it".into());
    }
    if name.contains('*') {
        return Err("a * can only be the whole of the first part, as in *.example.com".into());
    }
    if let Some(c) = name.chars().find(|c| !(c.is_ascii_alphanumeric() || "-_.".contains(*c))) {
        return Err(format!("a host name cannot contain {c:?}"));
    }
    if name.len() > 253 {
        return Err("a host name has at most 253 characters".into());
    }
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err("each part of a host name has 1 to 63 characters".into());
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err("no part of a host name can begin or end with a hyphen".into());
        }
    }
    if ends_in_a_number(&name) {
        return Err("it ends in a number, as only addresses do: write the dotted address, such as 127.0.0.1".into());
    }
    Ok(name)
}

/// Whether a URL's parser takes a name for an IPv4 address (WHATWG URL, "ends in a number checker"): so an entry for it
/// would never be met.
fn ends_in_a_number(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    last.bytes().all(|byte| byte.is_ascii_digit())
        || last.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Reads an address or a CIDR.
fn network(text: &str) -> Result<IpNet, String> {
    let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    if prefix.is_some_and(|prefix| prefix.contains(':')) {
        return Err("with a port, IPv6 stands in brackets".into());
    }
    let address: IpAddr = address.parse().map_err(|_| match prefix {
        Some(_) => "what stands before the / is no IP address, and a path is no part of an entry",
        None => "it is no IP address (with a port, IPv6 stands in brackets)",
    })?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let network = prefix
        .map_or(Some(longest), number)
        .and_then(|prefix| IpNet::new(address, prefix).ok())
        .ok_or_else(|| format!("the prefix length is a number from 0 to {longest}"))?;
    if network.network() != address {
        return Err(format!("it has bits set after its prefix, the network is {}", network.trunc()));
    }
    Ok(network)
}

/// Reads a port or a range of ports.
fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text| number(text).filter(|port| *port != 0);
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        (Some(_), Some(_)) => Err(format!("the port range {text} is empty")),
        _ => Err("a port is a number from 1 to 65535, or a range of them such as 8000-8999".into()),
    }
}

/// Reads digits. `FromStr` would take a sign, too.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// What makes an address not public; `None` when nothing does.
fn kind(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => v4_kind(address),
        IpAddr::V6(address) => v6_kind(address),
    }
}

/// Judges by the IANA IPv4 Special-Purpose Address Registry (RFC 6890), and by where clouds hand out credentials: one
/// of those addresses, 168.63.129.16, is in a public range.
fn v4_kind(address: Ipv4Addr) -> Option<&'static str> {
    Some(match address.octets() {
        // AWS and most others; Tencent, Scaleway; ECS and EKS; Alibaba; Azure; Oracle.
        [169, 254, 169, 254] | [169, 254, 0, 23] | [169, 254, 42, 42] | [169, 254, 170, 2 | 23] => METADATA,
        [100, 100, 100, 200] | [168, 63, 129, 16] | [192, 0, 0, 192] => METADATA,
        [0, 0, 0, 0] => UNSPECIFIED,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => PRIVATE,
        [100, 64..=127, ..] => CGNAT,
        [127, ..] => LOOPBACK,
        [169, 254, ..] => LINK_LOCAL,
        [192, 0, 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => DOCUMENTATION,
        [198, 18..=19, ..] => "a benchmarking address",
        [224..=239, ..] => MULTICAST,
        [255, 255, 255, 255] => "a broadcast address",
        [0, ..] | [192, 0, 0, _] | [192, 88, 99, _] | [240..=255, ..] => RESERVED,
        _ => return None,
    })
}

/// Judges by the IANA IPv6 Special-Purpose Address Registry and by the IPv6 Address Space registry: only 2000::/3 is
/// handed out. An address with an IPv4 one in it is no better than that.
fn v6_kind(address: Ipv6Addr) -> Option<&'static str> {
    Some(match address.segments() {
        // EC2, EKS, Google, Scaleway, OpenStack.
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254 | 0x23] | [0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254] => METADATA,
        [0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42] | [0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe] => METADATA,
        [0, 0, 0, 0, 0, 0, 0, 0] => UNSPECIFIED,
        [0, 0, 0, 0, 0, 0, 0, 1] => LOOPBACK,
        // IPv4-compatible, IPv4-mapped, NAT64.
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            return v4_kind(v4(high, low));
        }
        // 6to4.
        [0x2002, high, low, ..] => return v4_kind(v4(high, low)),
        [0x64, 0xff9b, 1, ..] => "a local NAT64 address",
        [0x100, 0, 0, 0, ..] => "a discard address",
        [0x2001, 0, ..] => "a Teredo address",
        [0x2001, 0..=0x1ff, ..] => RESERVED,
        [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => DOCUMENTATION,
        [0x2000..=0x3fff, ..] => return None,
        [0x5f00, ..] => "a segment routing address",
        [0xfc00..=0xfdff, ..] => PRIVATE,
        [0xfe80..=0xfebf, ..] => LINK_LOCAL,
        [0xfec0..=0xfeff, ..] => "a site-local address",
        [0xff00..=0xffff, ..] => MULTICAST,
        _ => RESERVED,
    })
}

/// The IPv4 address that a connection to an IPv4-mapped or NAT64 address arrives at. (6to4 only passes through one on
/// the way to another host, and nothing carries IPv4-compatible addresses any more.)
fn carried(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(address) = address else { return None };
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(v4(high, low)),
        _ => None,
    }
}

fn v4(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low))
}

#[cfg(test)]
mod tests;
