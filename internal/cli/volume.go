package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	apiv "github.com/moby/moby/api/types/volume"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) volumeCreateCommand() *cobra.Command {
	var name, driver string
	var labels, opts list
	cmd := &cobra.Command{
		Use: "create [OPTIONS] [VOLUME]", Short: "Create a volume", Args: a.between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				if name != "" {
					return errors.New("conflicting options: cannot specify a volume-name through both --name and as a positional arg")
				}
				name = args[0]
			}
			req := engine.VolumeCreateRequest{Name: name, Driver: driver}
			for _, l := range labels {
				if err := checkLabel(l, "--label"); err != nil {
					return a.usageError(cmd, err)
				}
				k, v, _ := strings.Cut(l, "=")
				req.Labels = with(req.Labels, k, v)
			}
			for _, o := range opts {
				k, v, _ := strings.Cut(o, "=")
				req.Options = with(req.Options, k, v)
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			v, err := e.CreateVolume(cmd.Context(), req)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, v.Name)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&driver, "driver", "d", "local", "Specify volume driver name")
	f.Var(&labels, "label", "Set metadata for a volume")
	f.StringVar(&name, "name", "", "Specify volume name")
	f.Lookup("name").Hidden = true
	f.VarP(&opts, "opt", "o", "Set driver specific options: type, o, device, size")
	const swarm = "cluster volumes belong to a swarm, which conex has not"
	for _, n := range []string{"availability", "group", "limit-bytes", "required-bytes", "scope", "secret", "sharing", "topology-preferred", "topology-required", "type"} {
		refuse(f, n, "", "string", swarm)
	}
	return cmd
}

func (a *app) volumeInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] VOLUME [VOLUME...]", Short: "Display detailed information on one or more volumes", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.inspect(cmd.Context(), args, format, a.findVolume())
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectHelp)
	return cmd
}

func (a *app) findVolume() func(context.Context, string) (any, error) {
	return func(_ context.Context, name string) (any, error) {
		e, err := a.engine()
		if err != nil {
			return nil, err
		}
		return e.InspectVolume(name)
	}
}

func (a *app) volumeLsCommand() *cobra.Command {
	var quiet bool
	var format string
	var filters filterFlag
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Short: "List volumes", Args: a.exactly(0), Aliases: []string{"list"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			filter := filters.m
			e, err := a.engine()
			if err != nil {
				return err
			}
			vols, lerr := e.ListVolumes(cmd.Context(), filter)
			if lerr != nil && vols == nil {
				return lerr
			}
			if quiet && format == "" {
				format = "{{.Name}}"
			}
			rows := make([]volumeRow, len(vols))
			for i := range vols {
				rows[i] = rowOfVolume(&vols[i])
			}
			head := headings{"Availability": "AVAILABILITY", "Driver": "DRIVER", "Group": "GROUP", "Labels": "LABELS", "Links": "LINKS", "Mountpoint": "MOUNTPOINT",
				"Name": "VOLUME NAME", "Scope": "SCOPE", "Size": "SIZE", "Status": "STATUS"}
			return errors.Join(writeList(a.out, format, `{{.Driver}}\t{{.Name}}`, head, rows), lerr)
		},
	}
	f := cmd.Flags()
	f.VarP(&filters, "filter", "f", `Provide filter values (e.g. "dangling=true")`)
	f.StringVar(&format, "format", "", formatHelp)
	f.BoolVarP(&quiet, "quiet", "q", false, "Only display volume names")
	refuse(f, "cluster", "", "bool", "cluster volumes belong to a swarm, which conex has not")
	return cmd
}

// volumeRow is a line of volume ls; its fields, in the order of their JSON form, are what templates may name.
type volumeRow struct {
	Availability, Driver, Group, Labels, Links, Mountpoint, Name, Scope, Size, Status string

	labels map[string]string
}

// Label is the value of one label, for templates.
func (r volumeRow) Label(name string) string { return r.labels[name] }

func rowOfVolume(v *apiv.Volume) volumeRow {
	var labels []string
	for _, k := range slices.Sorted(maps.Keys(v.Labels)) {
		labels = append(labels, k+"="+v.Labels[k])
	}
	const none = "N/A"
	return volumeRow{Availability: none, Driver: v.Driver, Group: none, Labels: strings.Join(labels, ","), Links: none, Mountpoint: v.Mountpoint, Name: v.Name, Scope: v.Scope,
		Size: none, Status: none, labels: v.Labels}
}

func (a *app) volumeRmCommand() *cobra.Command {
	var force, snapshots bool
	cmd := &cobra.Command{
		Use: "rm [OPTIONS] VOLUME[@SNAPSHOT] [VOLUME...]", Short: "Remove one or more volumes, or snapshots of them", Args: a.atLeast(1), Aliases: []string{"remove"},
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args {
				if err := e.RemoveVolume(cmd.Context(), engine.VolumeRemoveRequest{Name: name, Force: force, Snapshots: snapshots}); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.out, name)
			}
			return errors.Join(errs...)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&force, "force", "f", false, "Do not mind volumes that do not exist")
	f.BoolVar(&snapshots, "snapshots", false, "Remove the volumes' snapshots with them")
	return cmd
}

func (a *app) volumeRenameCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rename VOLUME NAME", Short: "Rename a volume that no container has", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return e.RenameVolume(cmd.Context(), args[0], args[1])
		},
	}
}
