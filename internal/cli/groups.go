package cli

import (
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
	return a.group("volume", "Manage volumes",
		a.volumeCloneCommand(), a.volumeCreateCommand(), a.volumeDuCommand(), a.volumeExportCommand(), a.volumeImportCommand(), a.volumeInspectCommand(),
		a.volumeLsCommand(), a.volumePruneCommand(), a.volumeRenameCommand(), a.volumeRestoreCommand(), a.volumeRmCommand(), a.volumeSnapshotCommand(),
		a.volumeSnapshotsCommand())
}
