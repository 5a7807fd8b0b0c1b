package cli

import (
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) historyCommand() *cobra.Command {
	var human, noTrunc, quiet bool
	var format, platform string
	cmd := &cobra.Command{
		Use: "history [OPTIONS] IMAGE", Short: "Show the history of an image", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			items, err := e.History(cmd.Context(), args[0], platform)
			if err != nil {
				return err
			}
			def := `{{.ID}}\t{{.CreatedSince}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}\t{{.SharedWith}}`
			if !human {
				def = strings.Replace(def, ".CreatedSince", ".CreatedAt", 1)
			}
			if quiet && (format == "" || format == "table") {
				format = "{{.ID}}"
			}
			head := headings{"ID": "IMAGE", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "CreatedBy": "CREATED BY", "Size": "SIZE", "Comment": "COMMENT",
				"Layer": "LAYER ID", "Shared": "SHARED", "SharedWith": "SHARED WITH"}
			return writeList(a.out, format, def, head, historyRows(items, !noTrunc, human, time.Now()))
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", formatHelp)
	f.BoolVarP(&human, "human", "H", true, "Print sizes and dates in human readable format")
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only show image IDs")
	f.StringVar(&platform, "platform", "", platformHelp)
	return cmd
}

// historyRow is a line of history; its fields, in the order of their JSON form, are what templates may name.
type historyRow struct {
	Comment, CreatedAt, CreatedBy, CreatedSince, ID, Layer, Shared, SharedWith, Size string
}

func historyRows(items []engine.HistoryItem, trunc, human bool, now time.Time) []historyRow {
	oneLine := strings.NewReplacer("\t", " ", "\r\n", " ", "\n", " ", "\r", " ")
	rows := make([]historyRow, len(items))
	for i, h := range items {
		created := time.Unix(h.Created, 0)
		r := historyRow{ID: h.ID, Comment: clean(oneLine.Replace(h.Comment)), CreatedBy: clean(oneLine.Replace(h.CreatedBy)), Size: strconv.FormatInt(h.Size, 10),
			Layer: string(h.Layer), Shared: strconv.FormatBool(len(h.SharedWith) > 0), SharedWith: sharedWith(h.SharedWith, trunc)}
		if h.Created > 0 {
			r.CreatedAt = created.Format(time.RFC3339)
			r.CreatedSince = r.CreatedAt
			if human {
				r.CreatedSince = units.HumanDuration(max(0, now.Sub(created))) + " ago"
			}
		} else {
			r.CreatedSince = "N/A"
		}
		if trunc {
			if r.ID != "<missing>" {
				r.ID = short(h.ID)
			}
			r.Layer, r.CreatedBy = short(r.Layer), ellipsis(r.CreatedBy, 45)
		}
		if human {
			r.Size = units.HumanSizeWithPrecision(float64(h.Size), 3)
		}
		rows[i] = r
	}
	return rows
}
