package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/moby/moby/api/types/network"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) networkGroup() *cobra.Command {
	return a.group("network", "Manage networks", a.networkConnectCommand(), a.networkCreateCommand(), a.networkDisconnectCommand(), a.networkInspectCommand(),
		a.networkLsCommand(), a.networkPruneCommand(), a.networkRepairCommand(), a.networkRmCommand())
}

func (a *app) networkRepairCommand() *cobra.Command {
	return &cobra.Command{
		Use: "repair", Short: "Mend bridges, forwarding and nftables that other tools have changed", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			done, err := e.RepairNetworks(cmd.Context())
			for _, d := range done {
				fmt.Fprintln(a.out, d)
			}
			return err
		},
	}
}

func (a *app) networkLsCommand() *cobra.Command {
	var quiet, noTrunc bool
	var format string
	var filters filterFlag
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Short: "List networks", Args: a.exactly(0), Aliases: []string{"list"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			fs := filters.m
			e, err := a.engine()
			if err != nil {
				return err
			}
			nets, err := e.ListNetworks(cmd.Context(), fs)
			if err != nil {
				return err
			}
			rows := make([]networkRow, len(nets))
			for i := range nets {
				rows[i] = newNetworkRow(&nets[i].Network, !noTrunc)
			}
			switch {
			case format == "raw" && quiet:
				format = `network_id: {{.ID}}`
			case format == "raw":
				format = `network_id: {{.ID}}\nname: {{.Name}}\ndriver: {{.Driver}}\nscope: {{.Scope}}\n`
			case quiet && (format == "" || format == "table"):
				format = "{{.ID}}"
			}
			head := headings{"ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Scope": "SCOPE", "CreatedAt": "CREATED AT", "IPv6": "IPV6", "IPv4": "IPV4",
				"Internal": "INTERNAL", "Labels": "LABELS"}
			return writeList(a.out, format, `{{.ID}}\t{{.Name}}\t{{.Driver}}\t{{.Scope}}`, head, rows)
		},
	}
	f := cmd.Flags()
	f.VarP(&filters, "filter", "f", `Provide filter values (e.g. "driver=bridge")`)
	f.StringVar(&format, "format", "", formatHelp)
	f.BoolVar(&noTrunc, "no-trunc", false, "Do not truncate the output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only display network IDs")
	return cmd
}

// networkRow is a line of network ls; its fields, in the order of their JSON form, are what templates may name.
type networkRow struct {
	CreatedAt, Driver, ID, IPv4, IPv6, Internal, Labels, Name, Scope string

	labels map[string]string
}

// Label returns one label's value, "" if it is not set.
func (r networkRow) Label(name string) string { return r.labels[name] }

func newNetworkRow(n *network.Network, trunc bool) networkRow {
	r := networkRow{
		CreatedAt: n.Created.String(), Driver: n.Driver, ID: n.ID, IPv4: strconv.FormatBool(n.EnableIPv4), IPv6: strconv.FormatBool(n.EnableIPv6),
		Internal: strconv.FormatBool(n.Internal), Labels: joinLabels(n.Labels), Name: n.Name, Scope: n.Scope, labels: n.Labels,
	}
	if trunc {
		r.ID = short(n.ID)
	}
	return r
}

func (a *app) networkInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] NETWORK [NETWORK...]", Short: "Display detailed information on one or more networks", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.inspect(cmd.Context(), args, format, a.findNetwork())
		},
	}
	f := cmd.Flags()
	f.StringVarP(&format, "format", "f", "", inspectHelp)
	f.BoolP("verbose", "v", false, "Verbose output for diagnostics") // tells of services of a swarm, of which there is none
	return cmd
}

func (a *app) findNetwork() func(context.Context, string) (any, error) {
	return func(ctx context.Context, name string) (any, error) {
		e, err := a.engine()
		if err != nil {
			return nil, err
		}
		return e.InspectNetwork(ctx, name)
	}
}

func (a *app) networkRmCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm NETWORK [NETWORK...]", Short: "Remove one or more networks", Args: a.atLeast(1), Aliases: []string{"remove"},
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			var errs []error
			for _, n := range args { // in order: a configuration goes after what was made from it
				err := e.RemoveNetwork(cmd.Context(), n)
				switch {
				case err == nil:
					fmt.Fprintln(a.out, n)
				case !force || !errors.Is(err, engine.ErrNotFound):
					errs = append(errs, err)
				}
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not error if the network does not exist")
	return cmd
}

func (a *app) networkPruneCommand() *cobra.Command {
	return a.pruneCommand("Remove all unused networks", engine.PruneRequest{Networks: true}, func(*cobra.Command, *engine.PruneRequest) {})
}

func (a *app) networkConnectCommand() *cobra.Command {
	var p placeFlags
	var driverOpts list
	var priority int
	cmd := &cobra.Command{
		Use: "connect [OPTIONS] NETWORK CONTAINER", Short: "Connect a container to a network", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			at, err := p.attachment(args[0])
			if err != nil {
				return a.usageError(cmd, err)
			}
			at.GwPriority = priority
			if at.DriverOpts, err = driverOptions(driverOpts); err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			return e.Connect(cmd.Context(), args[1], at)
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&p.aliases, "alias", nil, "Add network-scoped alias for the container")
	f.Var(&driverOpts, "driver-opt", "driver options for the network")
	f.IntVar(&priority, "gw-priority", 0, "Highest gw-priority provides the default gateway. Accepts positive and negative values.")
	f.Var(&p.ip, "ip", `IPv4 address (e.g., "172.30.100.104")`)
	f.Var(&p.ip6, "ip6", `IPv6 address (e.g., "2001:db8::33")`)
	f.Var(&p.links, "link", "Add link to another container")
	f.Var(&p.linkLocal, "link-local-ip", "Add a link-local address for the container")
	return cmd
}

func (a *app) networkDisconnectCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "disconnect [OPTIONS] NETWORK CONTAINER", Short: "Disconnect a container from a network", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return e.Disconnect(cmd.Context(), args[0], args[1], force)
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Force the container to disconnect from a network")
	return cmd
}
