package cli

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/moby/moby/api/types/network"
	"github.com/spf13/cobra"
)

// networkCreateFlags are the flags of network create that need more than a field of the request.
type networkCreateFlags struct {
	opts, labels, aux, ipamOpts list
	ipv4, ipv6                  bool
	configFrom, ipamDriver      string
	subnets                     []string
	ranges                      []net.IPNet
	gateways                    []net.IP
}

func (a *app) networkCreateCommand() *cobra.Command {
	var req network.CreateRequest
	var c networkCreateFlags
	cmd := &cobra.Command{
		Use: "create [OPTIONS] NETWORK", Short: "Create a network", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			req.Name = args[0]
			for _, l := range c.labels {
				if err := checkLabel(l, "--label"); err != nil {
					return a.usageError(cmd, err)
				}
			}
			req.Labels, req.Options = keyValues(c.labels), keyValues(c.opts)
			if cmd.Flags().Changed("ipv4") {
				req.EnableIPv4 = &c.ipv4
			}
			if cmd.Flags().Changed("ipv6") {
				req.EnableIPv6 = &c.ipv6
			}
			if c.configFrom != "" {
				req.ConfigFrom = &network.ConfigReference{Network: c.configFrom}
			}
			if req.IPAM, err = c.ipam(); err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			id, err := e.CreateNetwork(cmd.Context(), req)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, id)
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&req.Attachable, "attachable", false, "Enable manual container attachment")
	f.Var(&c.aux, "aux-address", "Auxiliary IPv4 or IPv6 addresses used by Network driver")
	f.StringVar(&c.configFrom, "config-from", "", "The network from which to copy the configuration")
	f.BoolVar(&req.ConfigOnly, "config-only", false, "Create a configuration only network")
	f.StringVarP(&req.Driver, "driver", "d", "bridge", "Driver to manage the Network")
	f.IPSliceVar(&c.gateways, "gateway", nil, "IPv4 or IPv6 Gateway for the master subnet")
	f.BoolVar(&req.Ingress, "ingress", false, "Create swarm routing-mesh network")
	f.BoolVar(&req.Internal, "internal", false, "Restrict external access to the network")
	f.IPNetSliceVar(&c.ranges, "ip-range", nil, "Allocate container ip from a sub-range")
	f.StringVar(&c.ipamDriver, "ipam-driver", "default", "IP Address Management Driver")
	f.Var(&c.ipamOpts, "ipam-opt", "Set IPAM driver specific options")
	f.BoolVar(&c.ipv4, "ipv4", true, "Enable or disable IPv4 address assignment")
	f.BoolVar(&c.ipv6, "ipv6", false, "Enable or disable IPv6 address assignment (by default where the host has IPv6)")
	f.Var(&c.labels, "label", "Set metadata on a network")
	f.VarP(&c.opts, "opt", "o", "Set driver specific options")
	f.StringVar(&req.Scope, "scope", "", "Control the network's scope")
	f.StringSliceVar(&c.subnets, "subnet", nil, "Subnet in CIDR format that represents a network segment")
	return cmd
}

// checkLabel refuses what can't be a label, in Docker's words.
func checkLabel(l, flag string) error {
	key, _, _ := strings.Cut(l, "=")
	switch key = strings.TrimLeft(key, " \t"); {
	case key == "":
		return fmt.Errorf("invalid argument %q for %q flag: invalid label '%s': empty name", l, flag, l)
	case strings.ContainsAny(key, " \t"):
		return fmt.Errorf("invalid argument %q for %q flag: label '%s' contains whitespaces", l, flag, key)
	}
	return nil
}

// ipam puts ranges, gateways and auxiliary addresses to the subnets that they lie in.
func (c *networkCreateFlags) ipam() (*network.IPAM, error) {
	if len(c.subnets) < len(c.ranges) || len(c.subnets) < len(c.gateways) {
		return nil, errors.New("every ip-range or gateway must have a corresponding subnet")
	}
	out := &network.IPAM{Driver: c.ipamDriver, Options: keyValues(c.ipamOpts)}
	for _, s := range c.subnets {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("invalid subnet: invalid CIDR address: %s", s)
		}
		for _, o := range out.Config {
			if o.Subnet.Overlaps(p) {
				return nil, errors.New("multiple overlapping subnet configuration is not supported")
			}
		}
		out.Config = append(out.Config, network.IPAMConfig{Subnet: p})
	}
	home := func(what, text string, ip net.IP) (*network.IPAMConfig, netip.Addr, error) {
		a, ok := netip.AddrFromSlice(ip)
		a = a.Unmap()
		for i := range out.Config {
			if ok && out.Config[i].Subnet.Contains(a) {
				return &out.Config[i], a, nil
			}
		}
		return nil, a, fmt.Errorf("no matching subnet for %s %s", what, text)
	}
	for i := range c.ranges {
		r := &c.ranges[i]
		at, a, err := home("range", r.String(), r.IP)
		if err != nil {
			return nil, err
		}
		if at.IPRange.IsValid() {
			return nil, fmt.Errorf("cannot configure multiple ranges (%s, %s) on the same subnet (%s)", r, at.IPRange, at.Subnet)
		}
		ones, _ := r.Mask.Size()
		at.IPRange = netip.PrefixFrom(a, ones)
	}
	for _, g := range c.gateways {
		at, a, err := home("gateway", g.String(), g)
		if err != nil {
			return nil, err
		}
		if at.Gateway.IsValid() {
			return nil, fmt.Errorf("cannot configure multiple gateways (%s, %s) for the same subnet (%s)", g, at.Gateway, at.Subnet)
		}
		at.Gateway = a
	}
	for _, x := range c.aux {
		name, text, _ := strings.Cut(x, "=")
		if text == "" {
			return nil, fmt.Errorf("--aux-address %s: it wants NAME=ADDRESS", x)
		}
		ip := net.ParseIP(text)
		if ip == nil {
			return nil, fmt.Errorf("--aux-address %s: %s is not an address", x, text)
		}
		at, a, err := home("aux-address", text, ip)
		if err != nil {
			return nil, err
		}
		if at.AuxAddress == nil {
			at.AuxAddress = map[string]netip.Addr{}
		}
		at.AuxAddress[name] = a
	}
	return out, nil
}
