package cli

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/network"
	"github.com/spf13/cobra"
)

func (a *app) portCommand() *cobra.Command {
	return &cobra.Command{
		Use: "port CONTAINER [PRIVATE_PORT[/PROTO]]", Short: "List port mappings or a specific mapping for the container", Args: a.between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
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
