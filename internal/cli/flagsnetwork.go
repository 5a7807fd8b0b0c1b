package cli

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// networkFlags are the container's network, its names and its ports.
type networkFlags struct {
	network                       string
	publishAll                    bool
	addHost, dns, expose, publish list
}

func (c *networkFlags) register(f *pflag.FlagSet) {
	f.Var(&c.addHost, "add-host", "Add a custom host-to-IP mapping (host:ip)")
	f.Var(&c.dns, "dns", "Set custom DNS servers")
	f.Var(&c.expose, "expose", "Expose a port or a range of ports")
	f.StringVar(&c.network, "network", "", `Connect a container to a network ("bridge", "none", "host")`)
	f.StringVar(&c.network, "net", "", "")
	f.Lookup("net").Hidden = true
	f.VarP(&c.publish, "publish", "p", "Publish a container's port(s) to the host")
	f.BoolVarP(&c.publishAll, "publish-all", "P", false, "Publish all exposed ports to random ports")
	refuseAll(f,
		"dns-opt",
		"dns-option",
		"dns-search",
		"ip",
		"ip6",
		"link",
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
	if strings.Contains(c.network, "=") {
		return fmt.Errorf("--network %s: options of a network are not supported yet", c.network)
	}
	host.NetworkMode = apic.NetworkMode(cmp.Or(c.network, "default"))
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
	return nil
}
