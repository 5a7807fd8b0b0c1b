package cli

import (
	"bufio"
	"fmt"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

// pruneCommand is a prune of what req names already; flags adds the command's own.
func (a *app) pruneCommand(short string, req engine.PruneRequest, flags func(cmd *cobra.Command, req *engine.PruneRequest)) *cobra.Command {
	var force bool
	filters := filterFlag{words: req.BuildCache && !req.Images}
	cmd := &cobra.Command{
		Use: "prune [OPTIONS]", Short: short, Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			req.Filters = filters.m
			if _, ok := req.Filters["until"]; ok && req.Volumes && req.Images {
				return fmt.Errorf("the %q filter is not supported with %q", "until", "--volumes")
			}
			sep := "\n"
			if !req.Containers && !req.Images && !req.Volumes {
				sep = " "
			}
			if req.Networks && !req.Containers {
				sep = "\n"
			}
			if !force && !a.confirm(pruneWarning(req)+sep+"Are you sure you want to continue?") {
				return nil
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			rep, err := e.Prune(cmd.Context(), req)
			a.printPruned(rep, err == nil && (!req.Networks || req.Images)) // networks take no space
			return err
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&force, "force", "f", false, "Do not prompt for confirmation")
	f.Var(&filters, "filter", `Provide filter values (e.g. "until=<timestamp>")`)
	flags(cmd, &req)
	return cmd
}

// confirm asks a question; no answer is a no.
func (a *app) confirm(question string) bool {
	fmt.Fprint(a.out, question+" [y/N] ")
	answer, err := bufio.NewReader(a.in).ReadString('\n')
	answer = strings.ToLower(strings.TrimSpace(answer))
	return (answer == "y" || answer == "yes") && err == nil
}

// printPruned prints a report as Docker does; the total only when all is done.
func (a *app) printPruned(rep engine.PruneReport, done bool) {
	list := func(title string, items []string) {
		if len(items) > 0 {
			fmt.Fprintf(a.out, "%s:\n%s\n\n", title, strings.Join(items, "\n"))
		}
	}
	list("Deleted Containers", rep.Containers)
	list("Deleted Networks", rep.Networks)
	list("Deleted Volumes", rep.Volumes)
	var images []string
	for _, i := range rep.Images {
		if i.Untagged != "" {
			images = append(images, "untagged: "+i.Untagged)
		} else {
			images = append(images, "deleted: "+i.Deleted)
		}
	}
	list("Deleted Images", images)
	if rep.Cache != nil {
		printCacheVerbose(a.out, rep.Cache)
	} else {
		list("Deleted build cache objects", rep.BuildCache)
	}
	if rep.Deferred {
		fmt.Fprintf(a.err, "%s: a pull, build or the like is under way: layers that nothing uses any more are removed when it ends\n", a.name)
	}
	if done {
		fmt.Fprintf(a.out, "Total reclaimed space: %s\n", units.HumanSize(float64(rep.Bytes)))
	}
}

func (a *app) builderPruneCommand() *cobra.Command {
	return a.pruneCommand("Remove build cache", engine.PruneRequest{BuildCache: true}, func(cmd *cobra.Command, req *engine.PruneRequest) {
		cmd.Flags().BoolVarP(&req.AllCache, "all", "a", false, "Remove all unused build cache, not just dangling ones")
		keep := (*bytesFlag)(&req.KeepStorage)
		cmd.Flags().Var(keep, "keep-storage", "Amount of disk space to keep for cache")
		cmd.Flags().Var(keep, "reserved-space", "Amount of disk space always allowed to keep for cache")
		cmd.Flags().Var((*bytesFlag)(&req.MaxUsed), "max-used-space", "Maximum amount of disk space allowed to keep for cache")
		cmd.Flags().Var((*bytesFlag)(&req.MinFree), "min-free-space", "Target amount of free disk space after pruning")
		cmd.Flags().BoolVar(&req.ListCache, "verbose", false, "Show every record that was removed in full")
	})
}

func (a *app) containerPruneCommand() *cobra.Command {
	return a.pruneCommand("Remove all stopped containers", engine.PruneRequest{Containers: true}, func(*cobra.Command, *engine.PruneRequest) {})
}

func (a *app) imagePruneCommand() *cobra.Command {
	return a.pruneCommand("Remove unused images", engine.PruneRequest{Images: true}, func(cmd *cobra.Command, req *engine.PruneRequest) {
		cmd.Flags().BoolVarP(&req.AllImages, "all", "a", false, "Remove all unused images, not just dangling ones")
	})
}

func (a *app) volumePruneCommand() *cobra.Command {
	return a.pruneCommand("Remove unused local volumes", engine.PruneRequest{Volumes: true}, func(cmd *cobra.Command, req *engine.PruneRequest) {
		cmd.Flags().BoolVarP(&req.AllVolumes, "all", "a", false, "Remove all unused volumes, not just anonymous ones")
	})
}

func (a *app) systemPruneCommand() *cobra.Command {
	req := engine.PruneRequest{Containers: true, Networks: true, Images: true, BuildCache: true}
	return a.pruneCommand("Remove unused data", req, func(cmd *cobra.Command, req *engine.PruneRequest) {
		var all bool
		f := cmd.Flags()
		f.BoolVarP(&all, "all", "a", false, "Remove all unused images not just dangling ones")
		f.BoolVar(&req.Volumes, "volumes", false, "Prune anonymous volumes")
		cmd.PreRun = func(*cobra.Command, []string) { req.AllImages, req.AllCache = all, all }
	})
}

// pruneWarning says in Docker's words what a request would remove.
func pruneWarning(req engine.PruneRequest) string {
	one := func(s string) string { return "WARNING! This will remove " + s }
	images := "all dangling images"
	if req.AllImages {
		images = "all images without at least one container associated to them"
	}
	if !req.Containers || !req.Images {
		switch {
		case req.Containers:
			return one("all stopped containers.")
		case req.Networks:
			return one("all custom networks not used by at least one container.")
		case req.Images:
			return one(images + ".")
		case req.Volumes && req.AllVolumes:
			return one("all local volumes not used by at least one container.")
		case req.Volumes:
			return one("anonymous local volumes not used by at least one container.")
		case req.AllCache:
			return one("all build cache.")
		default:
			return one("all dangling build cache.")
		}
	}
	lines := []string{"all stopped containers", "all networks not used by at least one container"}
	if req.Volumes {
		lines = append(lines, "all anonymous volumes not used by at least one container")
	}
	lines = append(lines, images)
	if req.AllCache {
		lines = append(lines, "all build cache")
	} else {
		lines = append(lines, "unused build cache")
	}
	s := "WARNING! This will remove:\n  - " + strings.Join(lines, "\n  - ") + "\n"
	if len(req.Filters) > 0 {
		var fs []string
		for k, vals := range req.Filters {
			for _, v := range vals {
				fs = append(fs, fmt.Sprintf("  - %s=%s\n", k, v))
			}
		}
		slices.Sort(fs)
		s += "\n  Items to be pruned will be filtered with:\n" + strings.Join(fs, "")
	}
	return s
}
