package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

const insecureHelp = "Allow communication with an insecure registry"

func (a *app) manifestGroup() *cobra.Command {
	return a.group("manifest", "Manage image manifests and manifest lists",
		a.manifestAnnotate(), a.manifestCreate(), a.manifestInspect(), a.manifestPush(), a.manifestRm())
}

func (a *app) manifestCreate() *cobra.Command {
	var req engine.ManifestCreateRequest
	cmd := &cobra.Command{
		Use: "create MANIFEST_LIST MANIFEST [MANIFEST...]", Short: "Create a local manifest list for annotating and pushing to a registry", Args: a.atLeast(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withEngine(cmd, func(ctx context.Context, e *engine.Engine) error {
				req.List, req.Images = args[0], args[1:]
				name, err := e.ManifestCreate(ctx, req)
				if err != nil {
					return err
				}
				fmt.Fprintln(a.out, "Created manifest list", name)
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&req.Amend, "amend", "a", false, "Amend an existing manifest list")
	f.BoolVar(&req.Insecure, "insecure", false, insecureHelp)
	return cmd
}

func (a *app) manifestAnnotate() *cobra.Command {
	var n engine.ManifestAnnotation
	cmd := &cobra.Command{
		Use: "annotate [OPTIONS] MANIFEST_LIST MANIFEST", Short: "Add additional information to a local image manifest", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return e.ManifestAnnotate(cmd.Context(), args[0], args[1], n)
		},
	}
	f := cmd.Flags()
	f.StringVar(&n.Arch, "arch", "", "Set architecture")
	f.StringVar(&n.OS, "os", "", "Set operating system")
	f.StringSliceVar(&n.OSFeatures, "os-features", nil, "Set operating system feature")
	f.StringVar(&n.OSVersion, "os-version", "", "Set operating system version")
	f.StringVar(&n.Variant, "variant", "", "Set architecture variant")
	return cmd
}

func (a *app) manifestInspect() *cobra.Command {
	var req engine.ManifestInspectRequest
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] [MANIFEST_LIST] MANIFEST", Short: "Display an image manifest, or manifest list", Args: a.between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withEngine(cmd, func(ctx context.Context, e *engine.Engine) error {
				if req.Name = args[0]; len(args) > 1 {
					req.List, req.Name = args[0], args[1]
				}
				out, err := e.ManifestInspect(ctx, req)
				if err != nil {
					return err
				}
				fmt.Fprintf(a.out, "%s\n", out)
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&req.Insecure, "insecure", false, insecureHelp)
	f.BoolVarP(&req.Verbose, "verbose", "v", false, "Output additional info including layers and platform")
	return cmd
}

func (a *app) manifestPush() *cobra.Command {
	var purge, insecure bool
	cmd := &cobra.Command{
		Use: "push [OPTIONS] MANIFEST_LIST", Short: "Push a manifest list to a repository", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withEngine(cmd, func(ctx context.Context, e *engine.Engine) error {
				d, err := e.ManifestPush(ctx, args[0], purge, insecure, func(line string) { fmt.Fprintln(a.out, line) })
				if err != nil {
					return err
				}
				fmt.Fprintln(a.out, d)
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&insecure, "insecure", false, "Allow push to an insecure registry")
	f.BoolVarP(&purge, "purge", "p", false, "Remove the local manifest list after push")
	return cmd
}

func (a *app) manifestRm() *cobra.Command {
	return &cobra.Command{
		Use: "rm MANIFEST_LIST [MANIFEST_LIST...]", Short: "Delete one or more manifest lists from local storage", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return e.ManifestRemove(cmd.Context(), args...)
		},
	}
}

func (a *app) searchCommand() *cobra.Command {
	var req engine.SearchRequest
	var format string
	var filters filterFlag
	var noTrunc bool
	cmd := &cobra.Command{
		Use: "search [OPTIONS] TERM", Short: "Search Docker Hub, or the catalog of a registry, for images", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			req.Filters = filters.m
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			req.Term = args[0]
			found, err := e.Search(ctx, req)
			if err != nil {
				return err
			}
			var rows []searchRow
			for _, r := range found {
				row := searchRow{Description: strings.NewReplacer("\n", " ", "\r", " ").Replace(r.Description), IsAutomated: "false", IsOfficial: fmt.Sprint(r.IsOfficial),
					Name: r.Name, StarCount: fmt.Sprint(r.StarCount)}
				if !noTrunc {
					row.Description = ellipsis(row.Description, 45)
				}
				rows = append(rows, row)
			}
			head := headings{"Name": "NAME", "Description": "DESCRIPTION", "StarCount": "STARS", "IsOfficial": "OFFICIAL", "IsAutomated": "AUTOMATED"}
			def := `{{.Name}}\t{{.Description}}\t{{.StarCount}}\t{{if eq .IsOfficial "true"}}[OK]{{else if ne .IsOfficial "false"}}{{.IsOfficial}}{{end}}`
			return writeList(a.out, format, def, head, rows)
		},
	}
	f := cmd.Flags()
	f.VarP(&filters, "filter", "f", "Filter output based on conditions provided")
	f.StringVar(&format, "format", "", "Pretty-print search using a Go template")
	f.IntVar(&req.Limit, "limit", 0, "Max number of search results")
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	return cmd
}

// searchRow is a line of search; its fields, in the order of their JSON form, are what templates may name.
type searchRow struct {
	Description, IsAutomated, IsOfficial, Name, StarCount string
}
