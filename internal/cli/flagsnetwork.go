package cli

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// networkFlags are the container's network, its names and its ports.
type networkFlags struct {
	ip                                         string
	networks                                   list
	publishAll                                 bool
	addHost, dns, dnsOption, dnsSearch, expose list
	link, publish                              list
}

func (c *networkFlags) register(f *pflag.FlagSet) {
	f.Var(&c.addHost, "add-host", "Add a custom host-to-IP mapping (host:ip)")
	f.Var(&c.dns, "dns", "Set custom DNS servers")
	f.Var(&c.dnsOption, "dns-option", "Set DNS options")
	f.Var(&c.dnsOption, "dns-opt", "Set DNS options")
	f.Lookup("dns-opt").Hidden = true
	f.Var(&c.dnsSearch, "dns-search", "Set custom DNS search domains")
	f.Var(&c.expose, "expose", "Expose a port or a range of ports")
	f.StringVar(&c.ip, "ip", "", "IPv4 address (e.g., 172.30.100.104)")
	f.Lookup("ip").Hidden = true
	f.Var(&c.link, "link", "Add link to another container")
	f.Var(&c.networks, "network", `Connect a container to a network ("bridge", "none", "host", "container:NAME")`)
	f.Var(&c.networks, "net", "")
	f.Lookup("net").Hidden = true
	f.VarP(&c.publish, "publish", "p", "Publish a container's port(s) to the host")
	f.BoolVarP(&c.publishAll, "publish-all", "P", false, "Publish all exposed ports to random ports")
	refuseAll(f,
		"ip6",
		"link-local-ip",
		"mac-address",
		"net-alias",
		"network-alias",
	)
}

func (c *networkFlags) apply(t *flagTarget) error {
	t.host.PublishAllPorts = c.publishAll
	if err := parsePublish(c.publish, t.config.ExposedPorts, t.host.PortBindings); err != nil {
		return err
	}
	if err := parseExpose(c.expose, t.config.ExposedPorts); err != nil {
		return err
	}
	if err := c.setNetwork(t.host); err != nil {
		return err
	}
	return c.setHosts(t.host)
}

func (c *networkFlags) setNetwork(host *apic.HostConfig) error {
	// No network that there is has addresses to choose from.
	if c.ip != "" {
		if _, err := netip.ParseAddr(c.ip); err != nil {
			return fmt.Errorf("invalid argument %q for \"--ip\" flag: failed to parse IP: %q", c.ip, c.ip)
		}
		return errors.New("user specified IP address is supported on user defined networks only")
	}
	// The networks that there are, are one or the other.
	if len(c.networks) > 1 {
		return fmt.Errorf("container cannot be connected to network endpoints: %s", strings.Join(c.networks, ", "))
	}
	name := strings.Join(c.networks, "")
	if strings.Contains(name, "=") {
		return fmt.Errorf("--network %s: options of a network are not supported yet", name)
	}
	host.NetworkMode = apic.NetworkMode(cmp.Or(name, "default"))
	return nil
}

func (c *networkFlags) setHosts(host *apic.HostConfig) error {
	for _, h := range c.addHost {
		name, ip, ok := strings.Cut(h, "=")
		if !ok {
			name, ip, ok = strings.Cut(h, ":")
		}
		if !ok || name == "" {
			return fmt.Errorf("bad format for add-host: %q", h)
		}
		ip = strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")
		if ip != "host-gateway" {
			if _, err := netip.ParseAddr(ip); err != nil {
				return fmt.Errorf("invalid IP address in add-host: %q", ip)
			}
		}
		host.ExtraHosts = append(host.ExtraHosts, name+":"+ip)
	}
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
	for _, l := range c.link {
		if l == "" || strings.Count(l, ":") > 1 {
			return fmt.Errorf("invalid argument %q for \"--link\" flag: bad format for links: %s", l, l)
		}
		host.Links = append(host.Links, l)
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
