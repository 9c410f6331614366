# Trains the services' three models, one after the other, skipping those that exist.
set -e
for settings in jobs/settings/quickstart-*.yaml; do
  jobs/finetune.py "$settings" storage=s3://gptj
done
