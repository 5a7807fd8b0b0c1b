package cli

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

// cacheRow is a line of builder du; its fields, in the order of their JSON form, are what templates may name.
type cacheRow struct {
	CreatedAt, Description, ID, LastUsedAt, LastUsedSince string
	Mutable, Reclaimable, Shared                          bool
	Size, Type                                            string
	SizeBytes                                             int64
}

func (a *app) builderDuCommand() *cobra.Command {
	filters := filterFlag{words: true}
	var verbose bool
	var format string
	cmd := &cobra.Command{
		Use: "du [OPTIONS]", Short: "Show what the build cache holds", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f := filters.m
			if verbose && format != "" {
				return a.usageError(cmd, fmt.Errorf("--format and --verbose cannot be used together"))
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			items, err := e.CacheUsage(cmd.Context(), f)
			if err != nil {
				return err
			}
			switch {
			case verbose:
				printCacheVerbose(a.out, items)
			case format != "":
				now := time.Now()
				rows := make([]cacheRow, len(items))
				for i, it := range items {
					rows[i] = cacheRow{
						CreatedAt: it.Created.Format(time.RFC3339), Description: clean(it.Description), ID: it.ID, LastUsedAt: it.LastUsed.Format(time.RFC3339),
						LastUsedSince: ago(it.LastUsed, now), Mutable: it.Mutable, Reclaimable: it.Reclaimable, Shared: it.Shared, Size: humanSize(it.Size),
						Type: it.Type, SizeBytes: it.Size,
					}
				}
				head := headings{"CreatedAt": "CREATED", "Description": "DESCRIPTION", "ID": "ID", "LastUsedAt": "LAST ACCESSED", "LastUsedSince": "LAST ACCESSED", "Mutable": "MUTABLE",
					"Reclaimable": "RECLAIMABLE", "Shared": "SHARED", "Size": "SIZE", "Type": "TYPE", "SizeBytes": "BYTES"}
				return writeList(a.out, format, `{{.ID}}\t{{.Reclaimable}}\t{{.Size}}\t{{.LastUsedSince}}`, head, rows)
			default:
				printCacheTable(a.out, items)
			}
			if len(filters.m) == 0 {
				printCacheSummary(a.out, items)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.Var(&filters, "filter", `Provide filter values (e.g. "type=exec.cachemount")`)
	f.StringVar(&format, "format", "", formatHelp)
	f.BoolVar(&verbose, "verbose", false, "Show every record in full")
	return cmd
}

// printCacheTable prints buildx du's table: a star marks what can change, and a size that something else shares.
func printCacheTable(out io.Writer, items []engine.CacheItem) {
	w := tabwriter.NewWriter(out, 1, 8, 1, '\t', 0)
	fmt.Fprintln(w, "ID\tRECLAIMABLE\tSIZE\tLAST ACCESSED")
	now := time.Now()
	for _, it := range items {
		id, size := it.ID[:min(len(it.ID), 25)], humanSize(it.Size)
		if it.Mutable {
			id += "*"
		}
		if it.Shared {
			size += "*"
		}
		fmt.Fprintf(w, "%-40s\t%-5v\t%-10s\t%s\n", id, it.Reclaimable, size, ago(it.LastUsed, now))
	}
	w.Flush() //nolint:errcheck // as with every other print
}

func printCacheVerbose(out io.Writer, items []engine.CacheItem) {
	w := tabwriter.NewWriter(out, 1, 8, 1, '\t', 0)
	now := time.Now()
	for _, it := range items {
		fmt.Fprintf(w, "ID:\t%s\nCreated at:\t%s\nMutable:\t%v\nReclaimable:\t%v\nShared:\t%v\nSize:\t%s\n", it.ID, it.Created, it.Mutable, it.Reclaimable, it.Shared,
			humanSize(it.Size))
		if it.Description != "" {
			fmt.Fprintf(w, "Description:\t%s\n", clean(strings.SplitN(it.Description, "\n", 2)[0]))
		}
		fmt.Fprintf(w, "Last used:\t%s\nType:\t%s\n\n", ago(it.LastUsed, now), it.Type)
	}
	w.Flush() //nolint:errcheck // as with every other print
}

func printCacheSummary(out io.Writer, items []engine.CacheItem) {
	var shared, private, reclaimable int64
	for _, it := range items {
		if it.Shared {
			shared += it.Size
		} else {
			private += it.Size
			if it.Reclaimable {
				reclaimable += it.Size
			}
		}
	}
	w := tabwriter.NewWriter(out, 1, 8, 1, '\t', 0)
	size := func(n int64) string { return units.HumanSizeWithPrecision(float64(n), 4) }
	if shared > 0 {
		fmt.Fprintf(w, "Shared:\t%s\nPrivate:\t%s\n", size(shared), size(private))
	}
	fmt.Fprintf(w, "Reclaimable:\t%s\nTotal:\t%s\n", size(reclaimable), size(shared+private))
	w.Flush() //nolint:errcheck // as with every other print
}
