package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

// builderCacheGroup is builder cache: the folders of RUN --mount=type=cache.
func (a *app) builderCacheGroup() *cobra.Command {
	return a.group("cache", "Manage cache mounts of builds", a.cacheExportCommand(), a.cacheImportCommand(), a.cacheLsCommand(), a.cacheRmCommand())
}

// cacheMountRow is a line of builder cache ls; its fields, in the order of their JSON form, are what templates may name.
type cacheMountRow struct {
	ID, Name, Owner, Size, Files, LastUsed, InUse string
}

func (a *app) cacheLsCommand() *cobra.Command {
	var quiet bool
	var format string
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Short: "List cache mounts", Args: a.exactly(0), Aliases: []string{"list"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			list, err := e.CacheMounts(cmd.Context())
			if err != nil {
				return err
			}
			var rows []cacheMountRow
			for _, m := range list {
				id := m.ID
				if id == "" {
					id = m.Name // by an older conex
				}
				rows = append(rows, cacheMountRow{
					ID: id, Name: m.Name, Owner: m.Owner, Size: units.HumanSizeWithPrecision(float64(m.Size), 3), Files: strconv.FormatInt(m.Files, 10),
					LastUsed: units.HumanDuration(time.Since(m.LastUsed)) + " ago", InUse: strconv.FormatBool(m.InUse),
				})
			}
			if quiet && format == "" {
				format = "{{.ID}}"
			}
			head := headings{"ID": "ID", "Name": "NAME", "Owner": "OWNER", "Size": "SIZE", "Files": "FILES", "LastUsed": "LAST USED", "InUse": "IN USE"}
			return writeList(a.out, format, `{{.ID}}\t{{.Name}}\t{{.Size}}\t{{.Files}}\t{{.LastUsed}}\t{{.InUse}}`, head, rows)
		},
	}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "Only display ids")
	return cmd
}

func (a *app) cacheExportCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "export [OPTIONS] ID", Short: "Write a cache mount as a tar, to standard output or a file", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, tty := terminal(a.out); tty && file == "" {
				return errors.New("refusing to write a tar to a terminal: use --output or redirect")
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			return a.output(file, func(w io.Writer) error { return e.ExportCacheMount(ctx, args[0], w) })
		},
	}
	cmd.Flags().StringVarP(&file, "output", "o", "", "Write to a file, instead of STDOUT")
	return cmd
}

func (a *app) cacheImportCommand() *cobra.Command {
	var req engine.CacheMountImport
	var mode string
	cmd := &cobra.Command{
		Use: "import [OPTIONS] ID FILE|-", Short: "Make a cache mount of a tar", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := a.in
			if args[1] != "-" {
				f, err := os.Open(args[1])
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			m, err := strconv.ParseUint(mode, 8, 12)
			if err != nil {
				return a.usageError(cmd, fmt.Errorf("invalid mode %q", mode))
			}
			for _, f := range []string{"mode", "uid", "gid"} {
				req.Owned = req.Owned || cmd.Flags().Changed(f)
			}
			req.ID, req.Mode = args[0], uint32(m)
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			return e.ImportCacheMount(ctx, req, in)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&req.Replace, "replace", false, "Throw a cache mount of the same id away")
	f.StringVar(&mode, "mode", "755", "Mode, where RUN --mount says one")
	f.IntVar(&req.UID, "uid", 0, "User, where RUN --mount says one")
	f.IntVar(&req.GID, "gid", 0, "Group, where RUN --mount says one")
	return cmd
}

func (a *app) cacheRmCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm ID [ID...]", Short: "Remove cache mounts", Args: a.atLeast(1), Aliases: []string{"remove"},
		RunE: func(_ *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			var failed error
			for _, id := range args {
				if err := e.RemoveCacheMount(id); err != nil {
					failed = errors.Join(failed, err)
					continue
				}
				fmt.Fprintln(a.out, id)
			}
			return failed
		},
	}
}
