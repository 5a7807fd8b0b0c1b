package cli

import (
	"fmt"
	"net/netip"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// networkFlags are the container's network, its names and its ports.
type networkFlags struct {
	place                             placeFlags
	mac                               string
	networks                          list
	publishAll                        bool
	addHost                           hostsFlag
	dns, dnsOption, dnsSearch, expose list
	publish, egress                   list
}

func (c *networkFlags) register(f *pflag.FlagSet) {
	f.Var(&c.addHost, "add-host", "Add a custom host-to-IP mapping (host:ip)")
	f.Var(&c.dns, "dns", "Set custom DNS servers")
	f.Var(&c.dnsOption, "dns-option", "Set DNS options")
	f.Var(&c.dnsOption, "dns-opt", "Set DNS options")
	f.Lookup("dns-opt").Hidden = true
	f.Var(&c.dnsSearch, "dns-search", "Set custom DNS search domains")
	f.Var(&c.egress, "egress", `Let the container reach nothing but answers ("deny"), only what is listed ("allow=HOST[:PORT],CIDR,..."), or anything ("any")`)
	f.Var(&c.expose, "expose", "Expose a port or a range of ports")
	f.Var(&c.place.ip, "ip", "IPv4 address (e.g., 172.30.100.104)")
	f.Var(&c.place.ip6, "ip6", "IPv6 address (e.g., 2001:db8::33)")
	f.Var(&c.place.links, "link", "Add link to another container")
	f.Var(&c.place.linkLocal, "link-local-ip", "Container IPv4/IPv6 link-local addresses")
	f.StringVar(&c.mac, "mac-address", "", "Container MAC address (e.g., 92:d0:c6:0a:29:33)")
	f.Var((*list)(&c.place.aliases), "network-alias", "Add network-scoped alias for the container")
	f.Var((*list)(&c.place.aliases), "net-alias", "")
	f.Lookup("net-alias").Hidden = true
	f.Var(&c.networks, "network", `Connect a container to a network ("bridge", "none", "host", "container:NAME", a network's name, or name=NAME,alias=...,ip=...)`)
	f.Var(&c.networks, "net", "")
	f.Lookup("net").Hidden = true
	f.VarP(&c.publish, "publish", "p", "Publish a container's port(s) to the host")
	f.BoolVarP(&c.publishAll, "publish-all", "P", false, "Publish all exposed ports to random ports")
}

func (c *networkFlags) apply(t *flagTarget) error {
	t.host.PublishAllPorts = c.publishAll
	if err := parsePublish(c.publish, t.config.ExposedPorts, t.host.PortBindings); err != nil {
		return err
	}
	t.options.Egress = c.egress
	if err := parseExpose(c.expose, t.config.ExposedPorts); err != nil {
		return err
	}
	if err := c.setNetwork(t); err != nil {
		return err
	}
	return c.setHosts(t.host)
}

// setNetwork says which networks the container is in, and which of them its mode names: the first one.
func (c *networkFlags) setNetwork(t *flagTarget) (err error) {
	if t.networks, err = c.attachments(); err != nil {
		return err
	}
	t.host.NetworkMode = apic.NetworkMode(t.networks[0].Network)
	return nil
}

// hostsFlag are lines for /etc/hosts, "name:address" or "name=address", kept as name:address.
type hostsFlag []string

func (l *hostsFlag) Set(s string) error {
	name, ip, ok := strings.Cut(s, "=")
	if !ok {
		name, ip, ok = strings.Cut(s, ":")
	}
	if !ok || name == "" {
		return fmt.Errorf("bad format for add-host: %q", s)
	}
	ip = strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")
	if ip != "host-gateway" {
		if _, err := netip.ParseAddr(ip); err != nil {
			return fmt.Errorf("invalid IP address in add-host: %q", ip)
		}
	}
	*l = append(*l, name+":"+ip)
	return nil
}
func (l *hostsFlag) Type() string   { return "list" }
func (l *hostsFlag) String() string { return "" }

func (c *networkFlags) setHosts(host *apic.HostConfig) error {
	host.ExtraHosts = c.addHost
	for _, d := range c.dns {
		a, err := netip.ParseAddr(d)
		if err != nil {
			return fmt.Errorf("invalid argument %q for \"--dns\" flag: IP address is not correctly formatted: %s", d, d)
		}
		host.DNS = append(host.DNS, a)
	}
	host.DNSOptions = c.dnsOption
	for _, d := range c.dnsSearch {
		if d = strings.Trim(d, " "); d != "." {
			if d = strings.TrimSuffix(d, "."); !isDomain(d) {
				return fmt.Errorf("invalid argument %q for \"--dns-search\" flag: %s is not a valid domain", d, d)
			}
		}
		host.DNSSearch = append(host.DNSSearch, d)
	}
	for _, l := range c.place.links {
		if err := checkLink(l); err != nil {
			return err
		}
	}
	if !host.NetworkMode.IsUserDefined() { // else they are the network's
		host.Links = c.place.links
	}
	return nil
}

// isDomain reports whether s is a name of letters, digits and hyphens between dots, with a letter in it.
func isDomain(s string) bool {
	letter := func(r rune) bool { return r|0x20 >= 'a' && r|0x20 <= 'z' }
	if len(s) >= 255 || !strings.ContainsFunc(s, letter) {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		if part == "" || part[0] == '-' || part[len(part)-1] == '-' {
			return false
		}
		if strings.ContainsFunc(part, func(r rune) bool { return !letter(r) && r != '-' && (r < '0' || r > '9') }) {
			return false
		}
	}
	return true
}
