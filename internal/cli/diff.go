package cli

import (
	"github.com/spf13/cobra"
)

// changeRow is a line of diff.
type changeRow struct{ Path, Type string }

func (a *app) diffCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "diff CONTAINER", Short: "Inspect changes to files or directories on a container's filesystem", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			list, err := e.Diff(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			rows := make([]changeRow, len(list))
			for i, c := range list {
				rows[i] = changeRow{c.Path, c.Kind.String()}
			}
			if format == "" {
				format = "{{.Type}} {{.Path}}"
			}
			return writeList(a.out, format, `{{.Type}}\t{{.Path}}`, headings{"Type": "CHANGE TYPE", "Path": "PATH"}, rows)
		},
	}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	return cmd
}
