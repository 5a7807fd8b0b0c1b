package cli

import (
	"encoding/csv"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	apic "github.com/moby/moby/api/types/container"

	"conex/internal/container"
)

// addrFlag is an IP address that may be left out.
type addrFlag struct{ netip.Addr }

func (a *addrFlag) Set(s string) (err error) {
	if a.Addr, err = netip.ParseAddr(strings.TrimSpace(s)); err != nil {
		return fmt.Errorf("failed to parse IP: %q", s)
	}
	a.Addr = a.Unmap()
	return nil
}
func (a *addrFlag) Type() string { return "ip" }
func (a *addrFlag) String() string {
	if !a.IsValid() {
		return ""
	}
	return a.Addr.String()
}

// addrsFlag is a list of addresses.
type addrsFlag []netip.Addr

func (l *addrsFlag) Set(s string) error {
	for v := range strings.SplitSeq(s, ",") {
		var a addrFlag
		if err := a.Set(v); err != nil {
			return err
		}
		*l = append(*l, a.Addr)
	}
	return nil
}
func (l *addrsFlag) Type() string   { return "list" }
func (l *addrsFlag) String() string { return "" }

// placeFlags are those that say how a container stands in one network.
type placeFlags struct {
	ip, ip6   addrFlag
	aliases   []string
	links     list
	linkLocal addrsFlag
}

func (p *placeFlags) attachment(name string) (container.Attachment, error) {
	for _, l := range p.links {
		if err := checkLink(l); err != nil {
			return container.Attachment{}, err
		}
	}
	return container.Attachment{Network: name, IPv4: p.ip.Addr, IPv6: p.ip6.Addr, Aliases: p.aliases, Links: p.links, LinkLocal: p.linkLocal}, nil
}

func checkLink(l string) error {
	if l == "" || strings.Count(l, ":") > 1 {
		return fmt.Errorf("invalid argument %q for \"--link\" flag: bad format for links: %s", l, l)
	}
	return nil
}

// driverOptions reads --driver-opt KEY=VALUE.
func driverOptions(opts []string) (map[string]string, error) {
	if len(opts) == 0 {
		return nil, nil
	}
	m := map[string]string{}
	for _, o := range opts {
		k, v, ok := strings.Cut(o, "=")
		if k = strings.TrimSpace(k); !ok || k == "" {
			return nil, errors.New("invalid key/value pair format in driver options")
		}
		m[k] = strings.TrimSpace(v)
	}
	return m, nil
}

// parseAttachment reads a value of --network: a name, or name=NAME,alias=...,ip=..., of which all but name may be left out, and some given
// several times.
func parseAttachment(s string) (container.Attachment, error) {
	if !strings.Contains(s, "=") {
		if strings.TrimSpace(s) == "" {
			return container.Attachment{}, errors.New("no name set for network")
		}
		return container.Attachment{Network: s}, nil
	}
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return container.Attachment{}, fmt.Errorf("invalid network %q: %w", s, err)
	}
	var at container.Attachment
	for _, f := range fields {
		key, v, ok := strings.Cut(f, "=")
		if !ok || key == "" {
			return at, fmt.Errorf("invalid field %s", f)
		}
		key, v = strings.ToLower(strings.TrimSpace(key)), strings.TrimSpace(v)
		var addr netip.Addr
		if key == "ip" || key == "ip6" || key == "link-local-ip" {
			if addr, err = netip.ParseAddr(v); err != nil {
				return at, err
			}
		}
		switch key {
		case "name":
			at.Network = v
		case "alias":
			at.Aliases = append(at.Aliases, v)
		case "ip":
			at.IPv4 = addr.Unmap()
		case "ip6":
			at.IPv6 = addr
		case "link-local-ip":
			at.LinkLocal = append(at.LinkLocal, addr.Unmap())
		case "mac-address":
			at.MAC = v
		case "driver-opt":
			k, o, ok := strings.Cut(v, "=")
			if k = strings.ToLower(strings.TrimSpace(k)); !ok || k == "" {
				return at, errors.New("invalid key value pair format in driver options")
			}
			if at.DriverOpts == nil {
				at.DriverOpts = map[string]string{}
			}
			at.DriverOpts[k] = strings.TrimSpace(o)
		case "gw-priority":
			if at.GwPriority, err = strconv.Atoi(v); err != nil {
				return at, fmt.Errorf("invalid gw-priority (%s): invalid syntax", v)
			}
		default:
			return at, fmt.Errorf("invalid field key %s", key)
		}
	}
	if at.Network == "" {
		return at, errors.New("network name/id is not specified")
	}
	return at, nil
}

// attachments are what --network and the flags beside it ask for, which are about the first network.
func (c *networkFlags) attachments() ([]container.Attachment, error) {
	var out []container.Attachment
	for _, s := range c.networks {
		at, err := parseAttachment(s)
		if err != nil {
			return nil, fmt.Errorf("invalid argument %q for \"--network\" flag: %w", s, err)
		}
		out = append(out, at)
	}
	if len(out) == 0 {
		out = append(out, container.Attachment{Network: "default"})
	}
	if err := c.complete(&out[0]); err != nil {
		return nil, err
	}
	own, other := false, false
	for i := range out {
		at := &out[i]
		mode := apic.NetworkMode(at.Network)
		if mode.IsUserDefined() {
			own = true
		} else {
			other = true
			switch {
			case len(at.Aliases) > 0:
				return nil, errors.New("network-scoped aliases are only supported for user-defined networks")
			case len(at.Links) > 0:
				return nil, errors.New("links are only supported for user-defined networks")
			}
		}
		for _, o := range out[:i] {
			if o.Network == at.Network {
				return nil, fmt.Errorf("network %q is specified multiple times", at.Network)
			}
		}
		if at.MAC != "" {
			mac, err := net.ParseMAC(strings.TrimSpace(at.MAC))
			if err != nil || len(mac) != 6 {
				return nil, fmt.Errorf("%s is not a valid mac address", at.MAC)
			}
			at.MAC = mac.String()
		}
	}
	if own && other {
		return nil, errors.New("conflicting options: cannot attach both user-defined and non-user-defined network-modes")
	}
	return out, nil
}

// complete adds what the flags of their own say about the first network.
func (c *networkFlags) complete(at *container.Attachment) error {
	for _, x := range []struct {
		both             bool
		flag, perNetwork string
	}{
		{len(at.Aliases) > 0 && len(c.place.aliases) > 0, "--network-alias", "alias"},
		{at.IPv4.IsValid() && c.place.ip.IsValid(), "--ip", "IPv4 address"},
		{at.IPv6.IsValid() && c.place.ip6.IsValid(), "--ip6", "IPv6 address"},
		{at.MAC != "" && c.mac != "", "--mac-address", "MAC address"},
		{len(at.LinkLocal) > 0 && len(c.place.linkLocal) > 0, "--link-local-ip", "link-local IP addresses"},
	} {
		if x.both {
			return fmt.Errorf("conflicting options: cannot specify both %s and per-network %s", x.flag, x.perNetwork)
		}
	}
	at.Aliases = append(at.Aliases, c.place.aliases...)
	if apic.NetworkMode(at.Network).IsUserDefined() { // on the default bridge they are something else
		at.Links = c.place.links
	}
	if c.place.ip.IsValid() {
		at.IPv4 = c.place.ip.Addr
	}
	if c.place.ip6.IsValid() {
		at.IPv6 = c.place.ip6.Addr
	}
	if c.mac != "" {
		at.MAC = c.mac
	}
	at.LinkLocal = append(at.LinkLocal, c.place.linkLocal...)
	return nil
}
