package cli

import (
	"cmp"
	"strings"

	"github.com/spf13/cobra"
)

// as gives a command another name, and more of them, for its group.
func as(cmd *cobra.Command, name string, aliases ...string) *cobra.Command {
	_, rest, _ := strings.Cut(cmd.Use, " ")
	cmd.Use = name
	if rest != "" {
		cmd.Use += " " + rest
	}
	cmd.Aliases = aliases
	return cmd
}

func (a *app) containerGroup() *cobra.Command {
	return a.group("container", "Manage containers",
		a.attachCommand(),
		a.commitCommand(),
		a.cpCommand(),
		a.createCommand(),
		a.debugCommand(),
		a.diffCommand(),
		a.execCommand(),
		a.exportCommand(),
		a.containerInspect(),
		a.killCommand(),
		a.logsCommand(),
		as(a.psCommand(), "ls", "list", "ps"),
		a.pauseCommand(),
		a.portCommand(),
		a.containerPruneCommand(),
		a.renameCommand(),
		a.restartCommand(),
		as(a.rmCommand(), "rm", "remove"),
		a.runCommand(),
		a.startCommand(),
		a.statsCommand(),
		a.stopCommand(),
		a.topCommand(),
		a.unpauseCommand(),
		a.updateCommand(),
		a.waitCommand(),
		a.whyCommand(),
	)
}

func (a *app) imageGroup() *cobra.Command {
	return a.group("image", "Manage images",
		a.imageDiffCommand(), a.imageExploreCommand(), a.imageLayersCommand(), a.imageTreeCommand(), a.imageMountCommand(), a.imageUnmountCommand(),
		a.buildCommand(), a.historyCommand(), a.importCommand(), a.imageInspect(), as(a.imagesCommand(), "ls", "list"), a.loadCommand(), a.imagePruneCommand(), a.pullCommand(), a.pushCommand(),
		as(a.rmiCommand(), "rm", "remove"), a.saveCommand(), a.tagCommand())
}

func (a *app) systemGroup() *cobra.Command {
	return a.group("system", "Manage conex", a.checkCommand(), a.dfCommand(), a.eventsCommand(), a.infoCommand(), a.systemPruneCommand(), a.teardownCommand())
}

func (a *app) builderGroup() *cobra.Command {
	return a.group("builder", "Manage builds", a.buildCommand(), a.builderCacheGroup(), a.builderDuCommand(), a.buildHistoryCommand(), a.builderPruneCommand())
}

func (a *app) buildxGroup() *cobra.Command {
	return a.group("buildx", "Build with the flags of Docker's buildx", as(a.buildCommand(), "build", "b"), a.builderDuCommand(), a.buildHistoryCommand(), a.builderPruneCommand())
}

func (a *app) volumeGroup() *cobra.Command {
	return a.group("volume", "Manage volumes", a.volumePruneCommand())
}

func (a *app) networkGroup() *cobra.Command {
	return a.group("network", "Manage networks", a.networkLsCommand(), a.networkPruneCommand())
}

func (a *app) networkLsCommand() *cobra.Command {
	var quiet, noTrunc bool
	var format string
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Short: "List networks", Args: a.exactly(0), Aliases: []string{"list"},
		RunE: func(*cobra.Command, []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			infos, err := e.Networks().Networks()
			if err != nil {
				return err
			}
			var rows []networkRow
			for _, n := range infos {
				id := n.ID
				if !noTrunc {
					id = short(id)
				}
				rows = append(rows, networkRow{CreatedAt: n.Created.String(), Driver: n.Driver, ID: id, IPv4: "true", IPv6: "false", Internal: "false", Name: n.Name,
					Scope: cmp.Or(n.Scope, "local")})
			}
			if quiet && format == "" {
				format = "{{.ID}}"
			}
			head := headings{"ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Scope": "SCOPE", "CreatedAt": "CREATED AT", "IPv6": "IPV6", "IPv4": "IPV4",
				"Internal": "INTERNAL", "Labels": "LABELS"}
			return writeList(a.out, format, `{{.ID}}\t{{.Name}}\t{{.Driver}}\t{{.Scope}}`, head, rows)
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", formatHelp)
	f.BoolVar(&noTrunc, "no-trunc", false, "Do not truncate the output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only display network IDs")
	refuseAll(f, "f|filter")
	return cmd
}

// networkRow is a line of network ls; its fields, in the order of their JSON form, are what templates may name.
type networkRow struct {
	CreatedAt, Driver, ID, IPv4, IPv6, Internal, Labels, Name, Scope string
}
