package cli

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"conex/internal/container"

	"github.com/moby/moby/api/types/network"
	"github.com/spf13/cobra"
)

func (a *app) portCommand() *cobra.Command {
	var audit bool
	var format string
	c := &cobra.Command{
		Use: "port [OPTIONS] CONTAINER [PRIVATE_PORT[/PROTO]]", Short: "List port mappings or a specific mapping for the container",
		Args: func(cmd *cobra.Command, args []string) error {
			if audit {
				return a.between(0, 1)(cmd, args)
			}
			return a.between(1, 2)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if audit {
				return a.auditPorts(cmd.Context(), append(args, "")[0], format)
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ports, err := e.Port(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if len(args) == 1 {
				for _, l := range portLines(ports) {
					fmt.Fprintln(a.out, l)
				}
				return nil
			}
			p, err := network.ParsePort(args[1])
			if err != nil {
				return err
			}
			if len(ports[p]) == 0 {
				return fmt.Errorf("no public port '%s' published for %s", p, args[0])
			}
			for _, b := range ports[p] {
				fmt.Fprintln(a.out, hostPort(b))
			}
			return nil
		},
	}
	c.Flags().BoolVar(&audit, "audit", false, "Show from where published ports can be reached, and which rule of which firewall decides")
	c.Flags().StringVar(&format, "format", "", formatHelp)
	c.AddCommand(a.portAddCommand(), a.portRmCommand())
	return c
}

func (a *app) auditPorts(ctx context.Context, name, format string) error {
	e, err := a.engine()
	if err != nil {
		return err
	}
	rows, err := e.AuditPorts(ctx, name)
	if err != nil {
		return err
	}
	head := headings{"Container": "CONTAINER", "Port": "PORT", "Published": "PUBLISHED", "From": "FROM", "Family": "4/6", "Reached": "REACHED", "Source": "SEEN AS", "Way": "WAY", "Why": "WHY"}
	return writeList(a.out, format, `{{.Container}}\t{{.Published}}->{{.Port}}\t{{.From}}\tIPv{{.Family}}\t{{.Reached}}\t{{.Source}}\t{{.Why}}`, head, rows)
}

func (a *app) portAddCommand() *cobra.Command {
	return &cobra.Command{
		Use: "add CONTAINER [IP:][HOST_PORT:]PRIVATE_PORT[/PROTO]...", Short: "Publish further ports of a container, also while it runs", Args: a.atLeast(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			exposed, bound := network.PortSet{}, network.PortMap{}
			if err := parsePublish(args[1:], exposed, bound); err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			if err := e.ChangePorts(cmd.Context(), args[0], container.PortChange{Add: bound}); err != nil {
				return err
			}
			ports, err := e.Port(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			for p := range ports { // of a stopped container there are none
				if _, ok := bound[p]; !ok {
					delete(ports, p)
				}
			}
			for _, l := range portLines(ports) {
				fmt.Fprintln(a.out, l)
			}
			return nil
		},
	}
}

func (a *app) portRmCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm CONTAINER [IP:]HOST_PORT[:PRIVATE_PORT][/PROTO]...", Short: "Take published ports of a container back, also while it runs", Args: a.atLeast(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var c container.PortChange
			for _, s := range args[1:] {
				n, err := parsePortName(s)
				if err != nil {
					return err
				}
				c.Remove = append(c.Remove, n)
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			return e.ChangePorts(cmd.Context(), args[0], c)
		},
	}
}

// parsePortName reads [IP:]HOST_PORT[:PRIVATE_PORT][/PROTO].
func parsePortName(spec string) (n container.PortName, err error) {
	s, proto, _ := strings.Cut(spec, "/")
	if n.Proto, err = protocol(proto); err != nil {
		return n, err
	}
	ip, host, ctr := splitPort(s)
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); ip == "" && err == nil && strings.Contains(host, ".") { // IP:HOST_PORT
		ip, host, ctr = host, ctr, ""
	} else if strings.HasSuffix(host, "]") { // [::1]:HOST_PORT
		ip, host, ctr = ip+":"+host, ctr, ""
	} else if host == "" {
		host, ctr = ctr, ""
	}
	if ip != "" {
		if n.HostIP, err = netip.ParseAddr(strings.Trim(ip, "[]")); err != nil {
			return n, fmt.Errorf("invalid IP address: %s", ip)
		}
	}
	if h, err := strconv.ParseUint(host, 10, 16); err != nil || h == 0 {
		return n, fmt.Errorf("invalid hostPort: %s", host)
	}
	n.HostPort = host
	if ctr == "" {
		return n, nil
	}
	p, err := strconv.ParseUint(ctr, 10, 16)
	if err != nil || p == 0 {
		return n, fmt.Errorf("invalid containerPort: %s", ctr)
	}
	n.Private = uint16(p)
	return n, nil
}

func hostPort(b network.PortBinding) string {
	ip := "0.0.0.0"
	if b.HostIP.IsValid() {
		ip = b.HostIP.String()
	}
	return net.JoinHostPort(ip, b.HostPort)
}

// portLines lists the mappings in the order of the container's ports.
func portLines(ports network.PortMap) []string {
	keys := make([]network.Port, 0, len(ports))
	for p := range ports {
		keys = append(keys, p)
	}
	slices.SortFunc(keys, func(x, y network.Port) int {
		if x.Num() != y.Num() {
			return int(x.Num()) - int(y.Num())
		}
		return strings.Compare(string(x.Proto()), string(y.Proto()))
	})
	var lines []string
	for _, p := range keys {
		for _, b := range ports[p] {
			lines = append(lines, fmt.Sprintf("%s -> %s", p, hostPort(b)))
		}
	}
	return lines
}
