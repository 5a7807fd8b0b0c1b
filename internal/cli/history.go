package cli

import (
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	apii "github.com/moby/moby/api/types/image"
	"github.com/spf13/cobra"
)

func (a *app) historyCommand() *cobra.Command {
	var human, noTrunc, quiet bool
	var format string
	cmd := &cobra.Command{
		Use: "history [OPTIONS] IMAGE", Short: "Show the history of an image", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			items, err := e.History(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			def := `{{.ID}}\t{{.CreatedSince}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}`
			if !human {
				def = strings.Replace(def, ".CreatedSince", ".CreatedAt", 1)
			}
			if quiet && (format == "" || format == "table") {
				format = "{{.ID}}"
			}
			head := headings{"ID": "IMAGE", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "CreatedBy": "CREATED BY", "Size": "SIZE", "Comment": "COMMENT"}
			return writeList(a.out, format, def, head, historyRows(items, !noTrunc, human, time.Now()))
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", formatHelp)
	f.BoolVarP(&human, "human", "H", true, "Print sizes and dates in human readable format")
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only show image IDs")
	refuseAll(f, "platform")
	return cmd
}

// historyRow is a line of history; its fields, in the order of their JSON form, are what templates may name.
type historyRow struct {
	Comment, CreatedAt, CreatedBy, CreatedSince, ID, Size string
}

func historyRows(items []apii.HistoryResponseItem, trunc, human bool, now time.Time) []historyRow {
	oneLine := strings.NewReplacer("\t", " ", "\r\n", " ", "\n", " ", "\r", " ")
	rows := make([]historyRow, len(items))
	for i, h := range items {
		created := time.Unix(h.Created, 0)
		r := historyRow{ID: h.ID, Comment: oneLine.Replace(h.Comment), CreatedBy: oneLine.Replace(h.CreatedBy), Size: strconv.FormatInt(h.Size, 10)}
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
			r.CreatedBy = ellipsis(r.CreatedBy, 45)
		}
		if human {
			r.Size = units.HumanSizeWithPrecision(float64(h.Size), 3)
		}
		rows[i] = r
	}
	return rows
}
